"""Stands where SGLang imports its compiled kernels, on a machine without a GPU; calling one is an
error.

SGLang imports the names of its CPU kernels even if it then takes plain torch (`--attention-backend
torch_native`). Only those names exist here, so that whatever else SGLang looks for is still found
missing.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def absent(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} is not built here: run SGLang with its torch back ends"
        )

    return absent
