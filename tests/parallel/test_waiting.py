"""Ranks wait for rank 0's rollouts over gloo: each one's own arrive exactly, and the wait has a
limit and a name.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_efr.policy.packing import samples
from megatron_efr.policy.scatter import flatten
from tests.parallel.launch import run_ranks
from tests.parallel.waiting import LIMIT_S, groups

pytestmark = pytest.mark.parallel


def test_each_rank_gets_its_own_sequences_exactly_and_a_wait_in_vain_says_what_for(
    tmp_path: Path,
) -> None:
    run_ranks(2, "tests.parallel.waiting", tmp_path, check=False)
    drawn = samples(groups())
    for rank, known, own in ((0, 3, [7, 2, 0, 3]), (1, 0, [1, 9, 11, 4])):
        found, indices, flat = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found == known, "groups stay with rank 0"
        assert indices == own, "and others' sequences with the others"
        wanted = flatten([drawn[i] for i in own])
        assert all(torch.equal(a, b) for a, b in zip(flat, wanted, strict=True))
        figures = (2**41 + 1, {"both": 1.0, "only 0": 5.0, "only 1": 5.0})
        assert torch.load(tmp_path / f"figures{rank}.pt") == figures, "sum and maxima over ranks"
    assert not (tmp_path / "0.txt").exists()
    said = (tmp_path / "1.txt").read_text()
    assert said.startswith(
        f"rank 1 waited {LIMIT_S:.0f} s for rollouts of rank 0: the limit is parallel.wait_limit_s"
    )
