"""A bucket's CUDA handle opens in a process to which the GPU bears another number, as SGLang opens
it.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.transports import encode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPENER = """
import base64, pickle, sys
import torch
from torch.multiprocessing import reductions

original = reductions.rebuild_cuda_tensor

def by_uuid(*arguments):  # as sglang.srt.utils.patch_torch does
    uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return original(*arguments[:6], uuids.index(arguments[6]), *arguments[7:])

reductions.rebuild_cuda_tensor = by_uuid
found = pickle.loads(base64.b64decode(sys.stdin.read()))
for part in found["metadata"]:
    tensor = found["flattened_tensor"][part.start_idx : part.end_idx].view(part.dtype).reshape(part.shape)
    print(part.name, tensor.double().sum().item())
"""


def test_a_bucket_opens_by_the_gpus_uuid() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    tensors = [
        ("a", torch.arange(12.0, device=device).view(3, 4)),
        ("b", torch.ones(8, device=device).bfloat16()),
    ]
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in tensors])
    payload, load_format = encode(Parcel(tensors, flat))
    assert load_format == "flattened_bucket"
    assert len(payload) < 4000
    visible = str(torch.cuda.get_device_properties(device).uuid)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": f"GPU-{visible}"}
    done = subprocess.run(
        [sys.executable, "-c", OPENER],
        input=payload,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["a", "66.0", "b", "8.0"]
