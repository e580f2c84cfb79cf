"""The figures of one training iteration, from its groups and its updates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_efr.types import Group, UserError


class LogprobMismatchError(UserError):
    """Engine and policy no longer compute the same distribution."""


class GradientError(UserError):
    """Updates can no longer be made."""


def iteration_metrics(
    groups: Sequence[Group],
    updates: Sequence[Mapping[str, float]],
    drift: Mapping[str, float],
    rollout_seconds: float,
) -> dict[str, float]:
    """Accuracy, lengths and rewards of the rollouts; the updates' figures; how far the log-probs are apart.

    Per-update figures are averaged over the iteration's updates (maxima kept), but `first_*`, which the first one of an
    iteration must show: ratio 1 and KL 0 to the policy that is being updated.
    """
    responses = [response for group in groups for response in group.responses]
    correct = np.concatenate([_filled(group.correct) for group in groups])
    lengths = np.concatenate([group.lengths for group in groups])
    rewards = np.concatenate([_filled(group.rewards) for group in groups])
    advantages = [_filled(group.advantages) for group in groups]
    metrics = {
        "accuracy": float(correct.mean()),
        "tokens_mean": float(lengths.mean()),
        "tokens_correct": _mean(lengths[correct]),
        "tokens_wrong": _mean(lengths[~correct]),
        "tokens_max": float(lengths.max()),
        "tokens_total": float(lengths.sum()),
        "truncated": float(np.mean([response.truncated for response in responses])),
        "reward_mean": float(rewards.mean()),
        "groups_without_signal": float(np.mean([not np.any(a) for a in advantages])),
    }
    statuses = Counter(status for group in groups for status in group.statuses)
    metrics |= {f"graded/{status}": float(count) for status, count in sorted(statuses.items())}
    metrics |= _averaged(updates)
    metrics |= {"first_ratio_max": updates[0]["ratio_max"], "first_kl_to_old": updates[0]["kl_to_old"]}
    return metrics | dict(drift) | {"time/tokens_per_s": metrics["tokens_total"] / rollout_seconds}


def check_logprobs(drift: Mapping[str, float], limit: float) -> None:
    """Stop a run whose engine and policy disagree: its advantages would be of another distribution's samples."""
    if drift["logprob_diff_mean"] > limit:
        raise LogprobMismatchError(
            f"engine and policy disagree on the log-probs of the sampled tokens by {drift['logprob_diff_mean']:.4f} on "
            f"average, more than train.max_logprob_diff = {limit}: the engine serves other weights, another "
            "temperature or another precision than the policy"
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
