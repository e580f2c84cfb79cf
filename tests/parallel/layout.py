"""One rank of a parity run (started by torchrun): two updates under a layout; rank 0 writes what came of them."""

from __future__ import annotations

import sys

import torch

from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_efr.policy import Policy, clipped_policy_loss, launched, split_into_updates
from tests.conftest import ragged_sequences


def main(model: str, out: str, layout: str) -> None:
    fields = dict(item.split("=") for item in layout.split(",") if item)
    parallel = ParallelConfig(**{k: v == "true" if k == "sequence" else int(v) for k, v in fields.items()})  # type: ignore[arg-type]
    sequences = ragged_sequences(32)
    with launched(parallel, seed=0) as ranks:
        policy = Policy(
            ModelConfig(path=model), parallel, OptimizerConfig(lr=1e-3, clip_grad=0.0, megatron={"optimizer": "sgd"}),
            ranks, updates=4, seed=0, keep_reference=True,
        )  # fmt: skip
        result: dict[str, object] = {"metrics": []}
        logprobs: dict[int, torch.Tensor] = {}
        for update in split_into_updates(32, 2, (0, 1)):
            batches = policy.pack_update(sequences, update, 300, "sequence")
            policy.fill_logprobs(batches)
            for batch in batches:
                assert batch.old_logprobs is not None
                assert batch.reference_logprobs is not None
                for i, part in zip(batch.indices, batch.old_logprobs.split(batch.row_lengths), strict=True):
                    logprobs[i] = part.cpu()
                advantage = torch.tensor([sequences[i].advantage for i in batch.indices])
                batch.advantages = advantage.repeat_interleave(torch.tensor(batch.row_lengths))
            metrics = policy.update(batches, clipped_policy_loss(0.2))
            result["metrics"].append(metrics | policy.compare_logprobs(batches, sequences))  # type: ignore[attr-defined]
            if "gradients" not in result:
                result["gradients"] = {name: tensor.clone() for name, tensor in policy.named_gradients()}
        result["weights"] = {name: tensor.clone() for name, tensor in policy.named_weights()}
        everyone: list[dict[int, torch.Tensor] | None] = [None] * ranks.world_size
        torch.distributed.all_gather_object(everyone, logprobs, group=ranks.cpu_world)
        result["logprobs"] = {i: part for table in everyone if table for i, part in table.items()}
        if ranks.is_main:
            torch.save(result, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
