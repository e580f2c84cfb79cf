"""The figures of one training iteration, from its groups and its updates, and what in them ends a
run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_efr import log
from megatron_efr.config import ModelConfig, TrainingConfig
from megatron_efr.evaluation.responses import repetition
from megatron_efr.types import Credit, Credited, UserError

IDENTITY_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Tolerance of ratio 1 and KL 0 before anything was learnt; exact in one packing on a CPU."""


class LogprobMismatchError(UserError):
    """Engine and policy no longer compute the same distribution."""


class IdentityError(UserError):
    """The first update of an iteration sees another policy than the one it updates."""


class GradientError(UserError):
    """Updates can no longer be made."""


def iteration_metrics(
    groups: Sequence[Credited],
    updates: Sequence[Mapping[str, float]],
    drift: Mapping[str, float],
    version: int,
    generation_seconds: float,
) -> dict[str, float]:
    """Accuracy, lengths and rewards of the rollouts; the updates' figures; how far the log-probs
    are apart.

    Per-update figures are averaged over the iteration's updates (maxima kept), but `first_*`, which
    the first one of an iteration must show: ratio 1 and KL 0 to the policy that is being updated. A
    rank that has no groups goes without the rollouts' figures. `version` is the policy's when the
    iteration began.
    """
    metrics = rollout_figures(groups, version) if groups else {}
    metrics |= _averaged(updates)
    metrics |= {
        "first_ratio_max": updates[0]["ratio_max"],
        "first_kl_to_old": updates[0]["kl_to_old"],
    }
    speed = metrics.get("tokens_total", 0.0) / generation_seconds if generation_seconds else 0.0
    return metrics | dict(drift) | {"time/generate": generation_seconds, "time/tokens_per_s": speed}


def rollout_figures(groups: Sequence[Credited], version: int) -> dict[str, float]:
    """Of credited groups. `staleness`: by how many publications a token is behind `version`, over
    tokens.
    """
    # flat arrays over responses
    responses = [response for group in groups for response in group.group.responses]
    spans = [span for response in responses for span in response.versions]
    behind = [(version - span.version, span.end - span.start) for span in spans]
    correct = np.concatenate([group.graded.correct for group in groups])
    lengths = np.concatenate([group.group.lengths for group in groups])
    rewards = np.concatenate([group.rewarded.rewards for group in groups])
    advantages = [group.credit.advantage for group in groups]
    right = [float(group.graded.correct.mean()) for group in groups]
    # each figure over all groups
    figures = {
        "accuracy": float(correct.mean()),
        "tokens_mean": float(lengths.mean()),
        "tokens_correct": _mean(lengths[correct]),
        "tokens_wrong": _mean(lengths[~correct]),
        "tokens_max": float(lengths.max()),
        "tokens_total": float(lengths.sum()),
        "staleness_mean": sum(lag * tokens for lag, tokens in behind)
        / float(sum(tokens for _, tokens in behind)),
        "staleness_max": float(max(lag for lag, _ in behind)),
        "truncated": float(np.mean([response.truncated for response in responses])),
        "reward_mean": float(rewards.mean()),
        "groups_without_signal": float(np.mean([not has_signal(group.credit) for group in groups])),
        "groups_all_right": float(np.mean([share == 1.0 for share in right])),
        "groups_all_wrong": float(np.mean([share == 0.0 for share in right])),
        "right_with_negative_advantage": _mean(np.concatenate(advantages)[correct] < 0),
        "repetition": float(np.mean([repetition(response.tokens) for response in responses])),
    }
    figures |= branch_figures(groups)
    # by data set, and by the verifiers' statuses
    for name in sorted({group.group.prompt.meta.get("dataset", "") for group in groups} - {""}):
        figures |= dataset_figures(
            name, [g for g in groups if g.group.prompt.meta.get("dataset") == name]
        )
    # the verifiers' statuses, those that are never reached left out
    statuses = Counter(grade.status for group in groups for grade in group.graded.grades)
    figures |= {f"graded/{status}": float(count) for status, count in sorted(statuses.items())}
    return figures


def branch_figures(groups: Sequence[Credited]) -> dict[str, float]:
    """Number of branches' answers, their tokens and, if judged, the share of right ones."""
    grades = [grade for group in groups for each in group.graded.branches for grade in each]
    if not grades:
        return {}
    answers = [
        answer
        for group in groups
        for response in group.group.responses
        for _, answer in response.answers
    ]
    return {
        "branches/answers": float(len(answers)),
        "branches/tokens": float(sum(answer.length for answer in answers)),
        "branches/accuracy": float(np.mean([grade.correct for grade in grades])),
    }


def has_signal(credit: Credit) -> bool:
    """True if any response, token or branch of a group has an advantage."""
    return any(
        np.any(values)
        for values in (credit.advantage, *(credit.per_token or ()), *(credit.branches or ()))
    )


def dataset_figures(name: str, groups: Sequence[Credited]) -> dict[str, float]:
    """Accuracy and lengths of the groups of data set `name`; NaN for a mean of nothing."""
    correct = np.concatenate([group.graded.correct for group in groups])
    lengths = np.concatenate([group.group.lengths for group in groups])
    return {
        f"accuracy/{name}": float(correct.mean()),
        f"tokens_mean/{name}": float(lengths.mean()),
        f"tokens_correct/{name}": _mean(lengths[correct]),
        f"tokens_wrong/{name}": _mean(lengths[~correct]),
    }


def check_identities(metrics: Mapping[str, float], model: ModelConfig, step: int) -> None:
    """Stop a run whose first update does not see the policy that it updates: ratio 1, KL 0.

    Before iteration 1 the policy is the initial model besides, so that its KL to that one is 0; if
    experts are replayed the initial model routes for itself. A figure that is not finite is left to
    `check_skipped`. An update that trains on nothing has no ratio, which is written as 0.
    """
    tolerance, ratio = IDENTITY_TOLERANCE[model.dtype], metrics["first_ratio_max"]
    found = {
        "first_ratio_max": ratio - 1.0 if ratio != 0.0 else 0.0,
        "first_kl_to_old": metrics["first_kl_to_old"],
    }
    if step == 1 and model.routing != "replay" and "kl" in metrics:
        found["kl"] = metrics["kl"]
    for name, off in found.items():
        if abs(off) > tolerance:
            raise IdentityError(
                f"iteration {step}: {name} is off by {off:.3g} before anything was learnt, and "
                f"may be by {tolerance:g} in {model.dtype}: the pass that gives log-probs and the "
                "pass that trains compute different things, and no update of this run can be "
                "trusted"
            )


def check_logprobs(drift: Mapping[str, float], config: TrainingConfig, loud: bool) -> None:
    """Stop a run whose engine and policy disagree: its advantages would be of another
    distribution's samples.

    Only tokens that the policy's own version drew are judged; the maximum is not, since single
    tokens may be far off in bf16. If it does not come to a stop, but is worth a look, rank 0
    (`loud`) says so.
    """
    found = drift["logprob_diff_mean"]
    disagree = (
        f"engine and policy disagree on the log-probs of the sampled tokens by {found:.4f} on "
        "average"
    )
    if found > config.max_logprob_diff:
        raise LogprobMismatchError(
            f"{disagree}, more than train.max_logprob_diff = {config.max_logprob_diff}: the "
            "engine serves other weights, another temperature or another precision than the policy"
        )
    if found > config.warns_above and loud:
        log.warning(
            f"{disagree}, more than train.warn_logprob_diff = {config.warns_above:g}; the run "
            f"stops at {config.max_logprob_diff}"
        )


def check_skipped(
    skipped_in_a_row: int, limit: int, when: str, rollouts: Path | None = None
) -> None:
    """Stop a run that only skips updates; `rollouts`: the file of the last iteration's, if any."""
    if skipped_in_a_row >= limit:
        replay = f"efr train CONFIG --replay {rollouts}"
        raise GradientError(
            (
                f"{when}: the last {skipped_in_a_row} updates had a gradient that is not finite "
                f"and were skipped (train.max_skipped = {limit})"
            )
            + (
                (
                    f". The iteration's rollouts are in {rollouts}; to run "
                    f"its updates alone: {replay}"
                )
                if rollouts
                else ""
            )
        )


def _averaged(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    averaged: dict[str, float] = {}
    for name in updates[0]:
        values = [update[name] for update in updates]
        averaged[name] = float(max(values) if name.endswith("_max") else np.mean(values))
    return averaged


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
