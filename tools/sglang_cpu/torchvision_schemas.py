"""Lets torchvision import beside a PyTorch without CUDA, if PyPI's build of it cannot load its
library.

Importing torchvision registers fake versions of two operators that this library would have
declared; here they are declared, before that import. Nothing in a language model calls them.
"""

import importlib.abc
import importlib.metadata
import sys
from collections.abc import Sequence
from types import ModuleType

_libraries = []  # a torch.library.Library withdraws its operators when it is collected


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; is asked once for torchvision, and so knows that its import begins."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None and "+cpu" not in importlib.metadata.version("torchvision"):
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
