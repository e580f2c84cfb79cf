"""Engine against policy, token by token: how far their log-probs are apart, and the importance weights that follow.

Three log-probs of a sampled token: the engine's when it was drawn, by whatever version of the weights then served; the
proximal ones, the policy's before its first update of the iteration (`old_logprobs`: ratio and KL refer to them); and
the current ones, which the loss differentiates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from megatron_efr.algorithms.objective import Importance
from megatron_efr.types import ByIndex, PackedBatch, Sequence


def engine_logprobs(batch: PackedBatch, sequences: ByIndex[Sequence]) -> torch.Tensor:
    """The engine's log-probs of the micro-batch's response tokens, fp32 [R]."""
    parts = [torch.tensor(sequences[i].engine_logprobs, dtype=torch.float32) for i in batch.indices]
    return torch.cat([torch.zeros(0), *parts]).to(batch.weights.device)


def version_lags(batch: PackedBatch, sequences: ByIndex[Sequence], version: int) -> torch.Tensor:
    """By how many versions the weights that drew each response token are behind `version`, int64 [R] on the CPU.

    0 for a sequence that does not say which weights drew it.
    """
    lags = torch.zeros(sum(batch.row_lengths), dtype=torch.int64)
    for i, part in zip(batch.indices, lags.split(batch.row_lengths), strict=True):
        for span in sequences[i].versions:
            part[span.start : span.end] = version - span.version
    return lags


def fill_importance(batches: list[PackedBatch], sequences: ByIndex[Sequence], importance: Importance) -> None:
    """Set `batch.importance` [R] by `Importance`, once the proximal log-probs are known.

    The weights are constants to the gradient, and exactly 1 where engine and policy agree exactly.
    """
    for batch in batches if importance.rule != "none" else []:
        assert batch.old_logprobs is not None
        rho = (batch.old_logprobs - engine_logprobs(batch, sequences)).exp()
        if importance.rule == "truncate":
            batch.importance = rho.clamp(max=importance.cap)
        else:
            inside = (importance.low <= rho) & (rho <= importance.high)
            batch.importance = torch.where(inside, rho, 0.0)


def drift_sums(batch: PackedBatch, sequences: ByIndex[Sequence], version: int) -> dict[str, float]:
    """A micro-batch's part of `drift_figures`: sums, and maxima where the name ends in `_max`."""
    assert batch.old_logprobs is not None
    log_rho = batch.old_logprobs - engine_logprobs(batch, sequences)
    difference = log_rho.abs().double().cpu()
    sums = {"tokens": float(difference.numel())}
    if batch.reference_logprobs is not None:
        sums["kl"] = float((batch.old_logprobs - batch.reference_logprobs).double().sum())
    if batch.importance is not None:
        sums["importance_mean"] = float(batch.importance.double().sum())
        sums["importance_cut"] = float((batch.importance != log_rho.exp()).sum())
    lags = version_lags(batch, sequences, version)
    for lag in lags.unique().tolist():
        part = difference[lags == lag]
        sums |= {f"tokens_lag{lag}": float(part.numel()), f"logprob_diff_lag{lag}_mean": float(part.sum())}
        sums[f"logprob_diff_lag{lag}_max"] = float(part.max())
    return sums


def drift_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over tokens and maxima, from the sums of all micro-batches.

    `logprob_diff_mean`, `logprob_diff_max`: |engine - proximal| over tokens that the policy's own version drew (NaN
    where there are none); `logprob_diff_lag<n>_mean`, `_max`: over those drawn n versions ago, which differ rightly.
    `kl`: proximal - initial model (k1), where a reference is kept. `importance_mean`, and `importance_cut`: the share
    of tokens whose weight the cap or the mask changed.
    """
    figures = {
        name: sums[name] / sums["tokens"] for name in ("kl", "importance_mean", "importance_cut") if name in sums
    }
    figures |= {"logprob_diff_mean": math.nan, "logprob_diff_max": math.nan}
    for lag in (int(name.removeprefix("tokens_lag")) for name in sums if name.startswith("tokens_lag")):
        said = f"_lag{lag}" if lag else ""
        figures[f"logprob_diff{said}_mean"] = sums[f"logprob_diff_lag{lag}_mean"] / sums[f"tokens_lag{lag}"]
        figures[f"logprob_diff{said}_max"] = sums[f"logprob_diff_lag{lag}_max"]
    return figures
