"""Finds out whether Transformer Engine works, and hides one that does not: imported before
Megatron, wherever that is.

Its core wheel without the part for torch raises FileNotFoundError when it is imported, a library
that is missing OSError. Megatron-Core takes only an ImportError for its absence, and would fall
over the others.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import torch  # noqa: F401 - loads the libraries that Transformer Engine's own look for

from megatron_efr import log

NAME = "transformer_engine"


def _imports() -> bool:
    if importlib.util.find_spec(NAME) is None:
        return False
    try:
        importlib.import_module(f"{NAME}.pytorch")
    except Exception as error:  # of any kind: see above
        # parts that did import would pass for the whole
        for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
            del sys.modules[name]
        sys.modules[NAME] = None  # type: ignore[assignment] - from now on importing it is an ImportError
        if os.environ.get("RANK", "0") == "0":
            log.warning(
                f"Transformer Engine is installed, but does not import ({type(error).__name__}: "
                f"{error}); this process goes on without it. Install its part for torch (bash "
                "launch/install_h100.sh), or uninstall the rest: pip uninstall transformer-engine "
                "transformer-engine-cu12 transformer-engine-cu13"
            )
        return False
    return True


WORKS = _imports()
