"""Refusals of a publisher before anything is published."""

from __future__ import annotations

import re

import pytest

from megatron_efr.config import RolloutConfig
from megatron_efr.errors import UserError
from megatron_efr.publication.build import check_allocator, transport_of


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_that_engines_cannot_open_is_refused_with_the_variable_that_asks_for_it(
    name: str,
) -> None:
    value = "max_split_size_mb:512, expandable_segments: True"
    with pytest.raises(
        UserError, match=rf"^{re.escape(name)}={re.escape(value)}: .* unset {name}, "
    ):
        check_allocator({name: value})
    for harmless in ({}, {name: "expandable_segments:False"}, {name: "max_split_size_mb:512"}):
        check_allocator(harmless)


@pytest.mark.parametrize(
    ("placement", "on_gpu", "kind"),
    [
        ("colocated", True, "tensor"),
        ("apart", True, "distributed"),
        ("apart", False, "distributed"),
        ("colocated", False, "distributed"),
    ],
)
def test_auto_never_sends_weights_as_text(placement: str, on_gpu: bool, kind: str) -> None:
    rollout = {"engine": "sglang", "placement": placement}
    assert transport_of(RolloutConfig.model_validate(rollout), on_gpu) == kind
    assert (
        transport_of(RolloutConfig.model_validate(rollout | {"transport": "disk"}), on_gpu)
        == "disk"
    )
