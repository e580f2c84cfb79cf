"""Lets SGLang keep routed experts in host memory that no GPU reads: registering it with CUDA
becomes no work.

`--enable-return-routed-experts` allocates pinned memory on every device, and pinning asks CUDA's
runtime.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MODULE = "sglang.srt.mem_cache.pool_host.common"


class _BeforePoolHost(importlib.abc.MetaPathFinder):
    """Finds one module, once, and has it loaded with another `_cuda_host_register`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> Any:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        import torch

        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and torch.version.cuda is None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        module._cuda_host_register = lambda *_, **__: None


sys.meta_path.insert(0, _BeforePoolHost())
