"""The SGLang engine: servers spoken to over HTTP, as one."""
