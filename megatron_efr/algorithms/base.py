"""An algorithm: how rewards become credits, and what objective a policy update has, as one checked
section.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, PositiveInt, model_validator

from megatron_efr.algorithms.baselines import Baseline, above_baseline, divided_by_spread, whitened
from megatron_efr.algorithms.objective import (
    KL,
    Aggregate,
    Deviation,
    Guard,
    Importance,
    Objective,
    Ratio,
    Spread,
    Surrogate,
)
from megatron_efr.config import RolloutConfig, Section

Normalize = Literal["none", "group", "batch", "tokens"]
Truncated = Literal["wrong", "masked", "soft"]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]

OVERLONG_SHARE = 5  # DAPO: the last 4,096 of 20,480 tokens


class Algorithm(Section):
    """Every choice between rewards and gradient. A subclass gives the defaults of its source, and
    its name.

    The defaults here are those of Arora & Zanette 2025 (arXiv 2502.04463): RLOO, KL in the reward,
    PPO's clip.
    """

    model_config = ConfigDict(frozen=True)
    surrogate: ClassVar[Surrogate] = "clip"
    ratio: ClassVar[Ratio] = "token"
    filters: ClassVar[bool] = False  # asks of a reward only on which side of a bound it is

    name: str = "rloo"
    baseline: Baseline = Field(
        default="others",
        description=(
            "taken off a reward: mean of the prompt's others, of all, by length, or nothing"
        ),
    )
    normalize: Normalize = Field(
        default="none",
        description=(
            "advantages as they are; divided by the spread of the prompt's rewards; whitened over "
            "the iteration's responses (batch) or over all its tokens (tokens, as the paper's "
            "released code does)"
        ),
    )
    deviation: Deviation = Field(
        default="population",
        description="the spread's kind; others: of the prompt's other rewards (NeMo-RL)",
    )
    guard: Guard = Field(
        default="floor",
        description="what `epsilon` is added to, or the least that the variance may be (floor)",
    )
    epsilon: Positive = 1e-8
    clip_low: Share = Field(
        default=0.2, description="a ratio is clipped below 1 - clip_low; 1: never"
    )
    clip_high: Positive = Field(default=0.2, description="a ratio is clipped above 1 + clip_high")
    dual_clip: float | None = Field(
        default=None,
        gt=1,
        description="bounds the loss of a negative advantage at this many times it",
    )
    kl: KL = Field(
        default="reward",
        description="KL to the initial model: none, in the reward (k1), or an estimate in the loss",
    )
    beta: Weight = Field(default=1e-3, description="weight of that KL; 0: none")
    aggregate: Aggregate = Field(
        default="sequence",
        description=(
            "mean over each sequence's tokens, then over sequences; over all tokens; or each "
            "sequence's sum over `divisor`, then the mean over sequences"
        ),
    )
    divisor: PositiveInt | Literal["limit", "longest"] = Field(
        default="limit",
        description=(
            "of aggregate: constant; limit: rollout.max_new_tokens; longest: the update's longest "
            "response"
        ),
    )
    entropy_bonus: Weight = Field(default=0.0, description="weight of the entropy in the loss")
    importance: Literal["auto", "none", "truncate", "mask"] = Field(
        default="auto",
        description=(
            "weight of a token by exp(policy before the update - engine), cut at importance_cap, "
            "or 0 outside importance_low to importance_high; auto: truncate where rollouts are "
            "partial or async, else none"
        ),
    )
    importance_cap: float = Field(default=2.0, gt=0)
    importance_low: float = Field(default=0.5, ge=0, le=1)
    importance_high: float = Field(default=5.0, ge=1)
    truncated: Truncated = Field(
        default="wrong",
        description=(
            "a response that was cut off counts as wrong; is left out of the loss besides; or "
            "pays, as every response does, for its tokens in the last overlong_tokens before the "
            "limit, up to 1"
        ),
    )
    overlong_tokens: PositiveInt | None = Field(
        default=None, description="truncated: soft; a fifth of rollout.max_new_tokens when left out"
    )
    dynamic_sampling: bool = Field(
        default=False,
        description="a prompt whose rewards are all equal is replaced by the next one (DAPO)",
    )

    @model_validator(mode="after")
    def _choices_go_together(self) -> Algorithm:
        for key, speaks, reason in self._conditions():
            if not speaks:
                self.refuse_idle("algorithm", [key], f"while {reason}")
        for refusal in self._contradictions():
            raise ValueError(refusal)
        return self

    def _conditions(self) -> list[tuple[str, bool, str]]:
        """(key, whether it speaks, why it does not) of the keys that speak in some settings
        alone.
        """
        plain, masks = self.normalize == "none", self.importance == "mask"
        cuts = self.importance in ("auto", "truncate")
        return [
            ("deviation", not plain, "algorithm.normalize is none"),
            ("guard", not plain, "algorithm.normalize is none"),
            ("epsilon", not plain, "algorithm.normalize is none"),
            ("divisor", self.aggregate == "constant", f"algorithm.aggregate is {self.aggregate}"),
            ("importance_cap", cuts, f"algorithm.importance is {self.importance}"),
            ("importance_low", masks, f"algorithm.importance is {self.importance}"),
            ("importance_high", masks, f"algorithm.importance is {self.importance}"),
            (
                "overlong_tokens",
                self.truncated == "soft",
                f"algorithm.truncated is {self.truncated}",
            ),
            ("beta", self.kl != "none", "algorithm.kl is none"),
        ]

    def _contradictions(self) -> list[str]:
        """Choices that contradict each other: one refusal for each, with the reason."""
        found = []
        if self.deviation == "others" and self.normalize != "group":
            found.append(
                "algorithm.deviation: others is the spread of a prompt's other rewards, and "
                f"algorithm.normalize: {self.normalize} looks at the whole batch; set normalize: "
                "group, or another deviation"
            )
        if self.deviation == "others" and self.baseline != "others":
            found.append(
                "algorithm.deviation: others leaves a response out of its own spread, and "
                f"algorithm.baseline: {self.baseline} does not leave it out of its baseline; set "
                "baseline: others"
            )
        if self.normalize == "group" and self.baseline == "none":
            found.append(
                "algorithm.normalize: group divides by the spread of a prompt's rewards, and "
                "algorithm.baseline: none leaves their mean in; set algorithm.baseline: mean, or "
                "normalize: none or batch"
            )
        if self.surrogate == "reweight" and self.dual_clip is not None:
            found.append(
                "algorithm.dual_clip: a ratio that only weighs has no minimum to bound; leave it "
                "out"
            )
        return found

    @property
    def min_samples(self) -> int:
        """Responses of one prompt that the baseline and the spread need."""
        return 1 if self.baseline == "none" else 2

    @property
    def _spread(self) -> Spread:
        return Spread(self.deviation, self.guard, self.epsilon)

    def credits(
        self, rewards: Sequence[np.ndarray], lengths: Sequence[np.ndarray], limit: int
    ) -> list[np.ndarray]:
        """One advantage per response, float64 [n] for each prompt's rewards [n] and lengths [n] in
        tokens.

        `limit` is the most tokens that a response may have (rollout.max_new_tokens).
        """
        paid = [
            self._paid(each, length, limit) for each, length in zip(rewards, lengths, strict=True)
        ]
        made = [
            above_baseline(each, length, self.baseline)
            for each, length in zip(paid, lengths, strict=True)
        ]
        if self.normalize == "group":
            return [
                divided_by_spread(each, group, self._spread)
                for each, group in zip(made, paid, strict=True)
            ]
        return whitened(made, self._spread) if self.normalize == "batch" else made

    def _paid(self, rewards: np.ndarray, lengths: np.ndarray, limit: int) -> np.ndarray:
        """Rewards, less the soft overlong penalty if it is on (DAPO, arXiv 2503.14476, eq. 13)."""
        rewards = np.asarray(rewards, dtype=np.float64)
        if self.truncated != "soft":
            return rewards
        window = self.overlong_tokens or -(-limit // OVERLONG_SHARE)
        return rewards - np.clip((lengths - (limit - window)) / window, 0.0, 1.0)

    def trains(self, truncated: np.ndarray) -> np.ndarray:
        """Responses that stand in the loss, bool [n], from those that were cut off, bool [n]."""
        return ~truncated if self.truncated == "masked" else np.ones_like(truncated)

    def passes(self, rewards: np.ndarray) -> np.ndarray:
        """Responses that stand in the loss by their rewards [n], bool [n], if the credits are the
        algorithm's.
        """
        return np.ones(len(rewards), dtype=bool)

    def keeps(self, rewards: np.ndarray) -> bool:
        """False if a prompt's rewards [n] teach nothing, and another prompt is to be asked in its
        place.
        """
        return not self.dynamic_sampling or bool(np.ptp(rewards) > 0.0)

    def objective(self, rollout: RolloutConfig) -> Objective:
        """The objective that loss and kernels execute, for responses drawn as `rollout` says."""
        rule = self.importance
        if rule == "auto":
            rule = "truncate" if rollout.off_policy else "none"
        divisor = rollout.max_new_tokens if self.divisor == "limit" else self.divisor
        return Objective(
            surrogate=self.surrogate,
            low=self.clip_low,
            high=self.clip_high,
            dual=self.dual_clip,
            ratio=self.ratio,
            kl=self.kl if self.beta > 0 else "none",
            beta=self.beta if self.kl != "none" else 0.0,
            bonus=self.entropy_bonus,
            aggregate=self.aggregate,
            divisor=divisor if self.aggregate == "constant" and isinstance(divisor, int) else None,
            tokens=self._spread if self.normalize == "tokens" else None,
            importance=Importance(
                rule, self.importance_cap, self.importance_low, self.importance_high
            ),
        )
