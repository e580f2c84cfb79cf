"""The comparison of log-probs: float64 is float64, rounding passes, a small mistake does not,
whatever the size.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_efr.errors import UserError
from megatron_efr.parity import Reference, exact_log_probs, load, log_probs, random_tokens
from tests.families import FAMILIES, make_family_folder

pytestmark = pytest.mark.alike


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_layer_by_layer_is_the_model_in_float64(family: str, tmp_path: Path) -> None:
    folder = make_family_folder(tmp_path / "model", family)
    model = load(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = random_tokens(61, length=20)
    found = exact_log_probs(model, ids)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # the model itself is in float32 again
    assert log_probs(model, ids).sub(found).abs().max() > 1e-8
    torch.testing.assert_close(found, log_probs(model.double(), ids), rtol=0, atol=1e-7)


def test_rounding_passes_and_a_small_mistake_does_not(tmp_path: Path) -> None:
    folder = make_family_folder(tmp_path / "model", "qwen2")
    model = load(folder)
    ids = random_tokens(61)
    reference = Reference.of(model, ids)
    assert 1e-8 < reference.mean < reference.worst < 1e-5
    assert "at most" in reference.compare(log_probs(model, ids), "x")
    large = Reference(reference.exact, 3.2e-4, 1.6e-5)  # as Qwen2.5-0.5B rounds
    assert ("transformers' float32 is 3.2e-04 and 1.6e-05 from them") in large.compare(
        reference.exact + 6e-5, "x"
    )
    with pytest.raises(
        UserError,
        match=r"x: log-probs .* 7\.0e-05 in the mean .* 1\.3e-03 and 6\.4e-05 are allowed",
    ):
        large.compare(reference.exact + 7e-5, "x")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] *= 1.001
    with pytest.raises(UserError, match="from float64's"):
        reference.compare(log_probs(model, ids), "x")
    with pytest.raises(UserError, match="nan at most"):
        reference.compare(reference.exact * float("nan"), "x")
