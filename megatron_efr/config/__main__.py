"""Prints the page of configuration."""

from megatron_efr.config.page import page

print(page(), end="")
