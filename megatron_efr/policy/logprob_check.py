"""Engine against policy, token by token: how far their log-probs are apart, and the importance
weights that follow.

Three log-probs of a sampled token: the engine's when it was drawn, by whatever version of the
weights then served; the proximal ones, the policy's before its first update of the iteration
(`old_logprob`: ratio and KL refer to them); and the current ones, which the loss differentiates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from megatron_efr.algorithms.objective import Importance
from megatron_efr.samples import NOT_DRAWN, PackedBatch


def fill_importance(batches: list[PackedBatch], importance: Importance) -> None:
    """Fill column `importance` by `Importance`, once the proximal log-probs are known.

    The weights are constants to the gradient, and exactly 1 if engine and policy agree exactly, and
    for a token that no engine drew.
    """
    for batch in batches if importance.rule != "none" else []:
        rho = _log_rho(batch).exp()
        if importance.rule == "truncate":
            batch.columns["importance"] = rho.clamp(max=importance.cap)
        else:
            inside = (importance.low <= rho) & (rho <= importance.high)
            batch.columns["importance"] = torch.where(inside, rho, 0.0)


def fill_behaviour(batches: list[PackedBatch]) -> None:
    """Fill column `behaviour_logprob` of the micro-batches that train on a token which a script
    chose, if any do.

    The policy did not draw that token, so its ratio is to the chance with which it was chosen
    (AdaptThink, arXiv 2505.13417, eq. 6, whose sampling distribution that is): what the response
    holds as the engine's log-prob.
    """
    for batch in batches:
        if batch.chosen:
            columns = batch.columns
            chosen = (columns["version"] == NOT_DRAWN) & (columns["weight"] > 0)
            columns["behaviour_logprob"] = torch.where(
                chosen, columns["engine_logprob"], columns["old_logprob"]
            )


def _log_rho(batch: PackedBatch) -> torch.Tensor:
    """Proximal less engine log-probs [R]; 0 for a token that no engine drew."""
    columns = batch.columns
    log_rho = columns["old_logprob"] - columns["engine_logprob"]
    return (
        torch.where(columns["version"] == NOT_DRAWN, 0.0, log_rho)
        if "version" in columns
        else log_rho
    )


def version_lags(batch: PackedBatch, version: int) -> torch.Tensor:
    """By how many versions the weights that drew each response token are behind `version`, int64
    [R] on the CPU.

    0 without a column that says which weights those were; -1 for a token that no weights drew.
    """
    if "version" not in batch.columns:
        return torch.zeros(sum(batch.row_lengths), dtype=torch.int64)
    versions = batch.columns["version"].cpu().long()
    return torch.where(versions == NOT_DRAWN, -1, version - versions)


def drift_sums(batch: PackedBatch, version: int) -> dict[str, float]:
    """A micro-batch's part of `drift_figures`, of the tokens that an engine drew: sums, and maxima
    for `_max`.
    """
    columns = batch.columns
    log_rho = _log_rho(batch)
    lags = version_lags(batch, version)
    drawn = lags >= 0
    difference = log_rho.abs().double().cpu()
    sums = {"tokens": float(drawn.sum())}
    if "reference_logprob" in columns:
        kl = (columns["old_logprob"] - columns["reference_logprob"]).cpu()
        sums["kl"] = float(kl[drawn].double().sum())
    if "importance" in columns:
        sums["importance_mean"] = float(columns["importance"].cpu()[drawn].double().sum())
        sums["importance_cut"] = float((columns["importance"] != log_rho.exp()).sum())
    for lag in lags[drawn].unique().tolist():
        part = difference[lags == lag]
        sums |= {
            f"tokens_lag{lag}": float(part.numel()),
            f"logprob_diff_lag{lag}_mean": float(part.sum()),
        }
        sums[f"logprob_diff_lag{lag}_max"] = float(part.max())
    return sums


def drift_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over tokens and maxima, from the sums of all micro-batches.

    `logprob_diff_mean`, `logprob_diff_max`: |engine - proximal| over tokens that the policy's own
    version drew (NaN if there are none); `logprob_diff_lag<n>_mean`, `_max`: over those drawn n
    versions ago, which differ rightly. `kl`: proximal - initial model (k1), if a reference is kept.
    `importance_mean`, and `importance_cut`: the share of tokens whose weight the cap or the mask
    changed.
    """
    figures = {
        name: sums[name] / max(sums["tokens"], 1.0)
        for name in ("kl", "importance_mean", "importance_cut")
        if name in sums
    }
    figures |= {"logprob_diff_mean": math.nan, "logprob_diff_max": math.nan}
    for lag in (
        int(name.removeprefix("tokens_lag")) for name in sums if name.startswith("tokens_lag")
    ):
        said = f"_lag{lag}" if lag else ""
        figures[f"logprob_diff{said}_mean"] = (
            sums[f"logprob_diff_lag{lag}_mean"] / sums[f"tokens_lag{lag}"]
        )
        figures[f"logprob_diff{said}_max"] = sums[f"logprob_diff_lag{lag}_max"]
    return figures
