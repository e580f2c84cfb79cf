"""Watches an iteration's figures for what makes a run pointless, and says in time why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST_CUT = 0.1
"""Share of the starting model's responses that the limit may cut: more, and it is below their 90%
length quantile.
"""

PATIENCE = 5
"""Iterations without a signal before that is said, and said again."""

ENTROPY_HIGH, ENTROPY_LOW = 2.0, 0.1
"""Of its start: above, the policy comes apart; below, it has stopped to explore."""


class Watch:
    """Memory of earlier iterations for warnings; `limit` is `rollout.max_new_tokens`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._start: float | None = None  # the first iteration's entropy
        self._strayed = ""  # where the entropy was when it was last said
        self._silent = 0  # iterations in a row without a signal

    def see(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """The warnings that iteration `step`, whose figures `metrics` are, gives reason for."""
        found = [
            self._cut_off(step, metrics),
            self._without_signal(metrics),
            self._entropy(metrics),
        ]
        return [f"iteration {step}: {said}" for said in found if said]

    def _cut_off(self, step: int, metrics: Mapping[str, float]) -> str:
        key = f"rollout.max_new_tokens = {self._limit}"
        cut = metrics["truncated"]
        if cut == 1.0:
            return (
                f"all responses were cut off at {key}, so that all count as wrong and nothing can "
                "be learnt; raise the limit, or see whether the model ends its answers at all "
                "(its stop tokens and chat template)"
            )
        if step == 1 and cut > MOST_CUT:
            return (
                f"{cut:.0%} of the starting model's responses were cut off: {key} is below their "
                f"{1 - MOST_CUT:.0%} length quantile, and what it cuts counts as wrong, however "
                "right it was going to be; raise the limit"
            )
        return ""

    def _without_signal(self, metrics: Mapping[str, float]) -> str:
        self._silent = self._silent + 1 if metrics["groups_without_signal"] == 1.0 else 0
        if self._silent == 0 or self._silent % PATIENCE:
            return ""
        right, wrong = metrics["groups_all_right"], metrics["groups_all_wrong"]
        if wrong == 1.0:
            why = (
                "every answer is wrong: the problems are too hard, the limit too low, or answers "
                "are not recognised"
            )
        elif right == 1.0:
            why = (
                "every answer is right, and the method rewards them alike: take harder problems, "
                "or weigh brevity more"
            )
        else:
            why = (
                f"{right:.0%} of groups are all right, {wrong:.0%} all wrong, and none has "
                "rewards that differ"
            )
        return (
            f"no group has had a signal for {self._silent} iterations, so that the policy learns "
            f"nothing; {why}"
        )

    def _entropy(self, metrics: Mapping[str, float]) -> str:
        entropy = metrics.get("entropy", math.nan)
        if not math.isfinite(entropy):  # a skipped update's
            return ""
        if self._start is None:
            self._start = entropy
        before = self._strayed
        self._strayed = self._where(entropy, self._start)
        if self._strayed in ("", before):
            return ""
        change = f"the entropy is {entropy:.3g}, and was {self._start:.3g} at the start"
        if self._strayed == "high":
            return f"{change}: the policy diverges; lower optimizer.lr, or raise algorithm.beta"
        return (
            f"{change}: the policy hardly explores any more; raise algorithm.entropy_bonus or "
            "algorithm.clip_high"
        )

    @staticmethod
    def _where(entropy: float, start: float) -> str:
        if entropy >= ENTROPY_HIGH * start > 0.0:
            return "high"
        return "low" if entropy <= ENTROPY_LOW * start else ""

    def state_dict(self) -> dict[str, Any]:
        """State that must survive a restart, JSON-ready."""
        return {"start": self._start, "strayed": self._strayed, "silent": self._silent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; nothing was seen if it is empty."""
        self._start, self._strayed = state.get("start"), state.get("strayed", "")
        self._silent = state.get("silent", 0)
