"""SGLang's checksums of a GPU's parameters, from its own kernels: `hashed.py KERNELS TENSORS`
prints them.

Started under Triton's interpreter (TRITON_INTERPRET=1), and with -O: its functions assert that a
tensor is on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import torch


def main(kernels: str, tensors: str) -> None:
    spec = importlib.util.spec_from_file_location("kernels", kernels)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    hashes = [module.gpu_tensor_hash(tensor, reduce_chunk=2) for tensor in torch.load(tensors)]
    print(json.dumps([f"{number:016x}" for number in hashes]))


if __name__ == "__main__":
    main(*sys.argv[1:])
