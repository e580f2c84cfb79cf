"""A checkpoint's file is written in a thread, and holds what lay on this rank's card, whichever
that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_efr.checkpoint.checkpoints import Checkpoints
from megatron_efr.config import CheckpointConfig
from megatron_efr.policy.ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2,
        reason="needs a second CUDA device: on the first none is wrong",
    ),
]


@pytest.fixture
def last_card(ranks: Ranks) -> Iterator[torch.device]:
    """The current device of this thread, as that of a host's last rank is."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    with torch.cuda.device(device):
        yield device


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_holds_what_the_last_card_computed_just_before(
    background: bool, last_card: torch.device, ranks: Ranks, tmp_path: Path
) -> None:
    def sharded(tensor: torch.Tensor) -> dict[str, Any]:
        return {"weight": ShardedTensor.from_rank_offsets("weight", tensor), "common": {}}

    checkpoints = Checkpoints(tmp_path, CheckpointConfig(background=background), ranks)
    weight = torch.randn(8192, 8192, device=last_card)
    for _ in range(50):  # the card is still at it when the file is begun
        weight = (weight @ weight).div_(weight.norm())
    path = checkpoints.save(1, sharded(weight), {})
    checkpoints.settle(wait=True)
    loaded, _ = checkpoints.load(path, sharded(torch.zeros_like(weight)))
    assert torch.equal(loaded["weight"].cpu(), weight.cpu())
