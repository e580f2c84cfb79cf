"""One rank (started by launch.py) that reshards a policy under one layout after the other and
compares with the folder.

python -m torch.distributed.run --nproc-per-node=2 -m tests.parallel.resharded MODELS OUT "tensor=2"
"pipeline=2" ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_efr.config import ModelConfig, OptimizerConfig
from megatron_efr.policy import Policy, join_ranks
from megatron_efr.policy.parameters import Parameters
from megatron_efr.policy.ranks import Ranks
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights
from tests.parallel.layout import split

BUCKET = 40_000  # bytes: the tiny models travel in several, and some have a tensor that is larger


def compare(path: str, layout: str, ranks: Ranks, dtype: str) -> dict[str, Any]:
    """Parcels to rank 0 and to everyone, flat and not, against the folder's tensors; what the plan
    is.
    """
    parallel = split(layout)
    model = ModelConfig(path=path, dtype=dtype)  # type: ignore[arg-type]
    policy = Policy(model, parallel, OptimizerConfig(lr=1e-3), ranks, updates=1, seed=0)
    parameters = Parameters(policy.chunks, policy.parameters._mapping, ranks, BUCKET)
    source = FolderWeights(path, Architecture.from_folder(path))
    for everywhere in (False, True):
        for flat in (False, True):
            names: list[str] = []
            for parcel in parameters.parcels(flat=flat, everywhere=everywhere):
                names += [name for name, _ in parcel.tensors]
                for name, tensor in parcel.tensors:
                    if everywhere or ranks.is_main:
                        assert torch.equal(tensor, source[name].to(tensor.dtype)), (layout, name)
                    else:
                        assert tensor.numel() == 0
                if parcel.flat is not None:
                    together = torch.cat(
                        [tensor.reshape(-1).view(torch.uint8) for _, tensor in parcel.tensors]
                    )
                    assert torch.equal(parcel.flat, together)
            assert sorted(names) == sorted(source.shapes), (layout, names)
    plan = parameters._reshards["weights"].plan
    plans: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(
        plans, (dist.get_process_group_ranks(ranks.replica_group), repr(plan.buckets))
    )
    # the same on every rank of rank 0's replica
    assert len({text for members, text in plans if 0 in members}) == 1
    return {"buckets": len(plan.buckets), "largest": plan.largest, "bytes": plan.nbytes}


def main(models: str, out: str, *cases: str) -> None:
    dist.init_process_group("gloo")
    for number, case in enumerate(cases):
        name, layout, dtype = case.split(":")
        with join_ranks(split(layout), seed=0) as ranks:
            found = compare(f"{models}/{name}", layout, ranks, dtype)
            if ranks.is_main:
                (Path(out) / f"{number}.json").write_text(json.dumps(found))
            ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
