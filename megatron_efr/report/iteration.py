"""The figures of one training iteration, from its groups and its updates."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_efr.config import TrainingConfig
from megatron_efr.types import Group, UserError


class LogprobMismatchError(UserError):
    """Engine and policy no longer compute the same distribution."""


class GradientError(UserError):
    """Updates can no longer be made."""


def iteration_metrics(
    groups: Sequence[Group],
    updates: Sequence[Mapping[str, float]],
    drift: Mapping[str, float],
    version: int,
    generation_seconds: float,
) -> dict[str, float]:
    """Accuracy, lengths and rewards of the rollouts; the updates' figures; how far the log-probs are apart.

    Per-update figures are averaged over the iteration's updates (maxima kept), but `first_*`, which the first one of an
    iteration must show: ratio 1 and KL 0 to the policy that is being updated. A rank that has no groups goes without
    the rollouts' figures. `version` is the policy's when the iteration began.
    """
    metrics = rollout_figures(groups, version) if groups else {}
    metrics |= _averaged(updates)
    metrics |= {"first_ratio_max": updates[0]["ratio_max"], "first_kl_to_old": updates[0]["kl_to_old"]}
    speed = metrics.get("tokens_total", 0.0) / generation_seconds if generation_seconds else 0.0
    return metrics | dict(drift) | {"time/generate": generation_seconds, "time/tokens_per_s": speed}


def rollout_figures(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Of scored groups. `staleness`: by how many publications a token is behind `version`, over tokens."""
    responses = [response for group in groups for response in group.responses]
    spans = [span for response in responses for span in response.versions]
    correct = np.concatenate([_filled(group.correct) for group in groups])
    lengths = np.concatenate([group.lengths for group in groups])
    rewards = np.concatenate([_filled(group.rewards) for group in groups])
    advantages = [_filled(group.advantages) for group in groups]
    figures = {
        "accuracy": float(correct.mean()),
        "tokens_mean": float(lengths.mean()),
        "tokens_correct": _mean(lengths[correct]),
        "tokens_wrong": _mean(lengths[~correct]),
        "tokens_max": float(lengths.max()),
        "tokens_total": float(lengths.sum()),
        "staleness_mean": sum((version - s.version) * (s.end - s.start) for s in spans) / float(lengths.sum()),
        "staleness_max": float(max(version - s.version for s in spans)),
        "truncated": float(np.mean([response.truncated for response in responses])),
        "reward_mean": float(rewards.mean()),
        "groups_without_signal": float(np.mean([not np.any(a) for a in advantages])),
    }
    statuses = Counter(status for group in groups for status in group.statuses)
    figures |= {f"graded/{status}": float(count) for status, count in sorted(statuses.items())}
    return figures


def check_logprobs(drift: Mapping[str, float], config: TrainingConfig, loud: bool) -> None:
    """Stop a run whose engine and policy disagree: its advantages would be of another distribution's samples.

    Only tokens that the policy's own version drew are judged; the maximum is not, since single tokens may be far off
    in bf16. Where it does not come to a stop, but is worth a look, rank 0 (`loud`) says so.
    """
    found = drift["logprob_diff_mean"]
    disagree = f"engine and policy disagree on the log-probs of the sampled tokens by {found:.4f} on average"
    if found > config.max_logprob_diff:
        raise LogprobMismatchError(
            f"{disagree}, more than train.max_logprob_diff = {config.max_logprob_diff}: the engine serves other "
            "weights, another temperature or another precision than the policy"
        )
    if found > config.warns_above and loud:
        print(
            f"warning: {disagree}, more than train.warn_logprob_diff = {config.warns_above:g}; the run stops at "
            f"{config.max_logprob_diff}",
            file=sys.stderr,
            flush=True,
        )


def check_skipped(skipped_in_a_row: int, limit: int, step: int, rollouts: Path) -> None:
    """Stop a run that only skips updates; `rollouts` is where the last iteration's are kept."""
    if skipped_in_a_row >= limit:
        raise GradientError(
            f"iteration {step}: the last {skipped_in_a_row} updates had a gradient that is not finite and were skipped "
            f"(train.max_skipped = {limit}). The iteration's rollouts are in {rollouts}; to run its updates alone: "
            f"efr train CONFIG --replay {rollouts}"
        )


def _averaged(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    combine = {name: max if name.endswith("_max") else np.mean for name in updates[0]}
    return {name: float(combine[name]([update[name] for update in updates])) for name in updates[0]}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _filled(values: np.ndarray | None) -> np.ndarray:
    if values is None:
        raise ValueError("a group without grades, rewards or advantages: score it before measuring it")
    return values
