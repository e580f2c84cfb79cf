"""Limits and targets: a response is measured by a number of tokens that is the same for all
prompts.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.methods.base import Choices, Needs
from megatron_efr.methods.plain import (
    Outcomes,
    Plain,
    check_no_soft_penalty,
    check_within,
    limit_of,
)
from megatron_efr.types import FloatArray

WINDOW_SHARE = 5  # DAPO: the last 4,096 of 20,480 tokens


class Overlong(Plain):
    """DAPO's soft overlong punishment.

        r = +-1 + min(0, ((max_tokens - cache) - l) / cache), no less than +-1 - 1

    A wrong or truncated response earns -1, and the punishment besides. Nothing is remembered.
    DAPO's lengths are 20,480 and 4,096. verl's and NeMo-RL's managers let the punishment fall below
    -1 (`floor: false`), which matters to responses of more than max_tokens alone.
    """

    source = "Yu et al. 2025, arXiv 2503.14476, eq. 13"
    standing = "code"
    wrong_may_win_if = "`floor` is false and `max_tokens` is below rollout.max_new_tokens"

    needs = Needs(samples=1)

    max_tokens: PositiveInt | None = Field(
        default=None,
        description="length at which the punishment is 1; rollout.max_new_tokens when left out",
    )
    cache: PositiveInt | None = Field(
        default=None,
        description="tokens before that over which it grows; a fifth of max_tokens when left out",
    )
    floor: bool = Field(default=True, description="the punishment is 1 at most")

    def rule(self, group: Outcomes) -> FloatArray:
        most = limit_of(self.max_tokens, group, "max_tokens")
        cache = self._cache(most)
        punishment = np.maximum(0.0, (group.lengths - (most - cache)) / cache)
        if self.floor:
            punishment = np.minimum(punishment, 1.0)
        return np.where(group.right, 1.0, -1.0) - punishment

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.max_tokens, rollout.max_new_tokens, "max_tokens")
        most = self.max_tokens or rollout.max_new_tokens
        if self._cache(most) > most:
            raise ConfigError(
                f"method.cache: {self.cache} tokens are more than the limit, {most}, that they "
                "end at"
            )

    def check_algorithm(self, algorithm: Choices) -> None:
        check_no_soft_penalty(algorithm, "overlong")

    def _cache(self, most: int) -> int:
        return self.cache or -(-most // WINDOW_SHARE)


class ThinkPrune(Plain):
    """ThinkPrune: a right answer within the limit earns 1, all else 0.

        r = c [l <= limit]

    A wrong or truncated response earns 0. Nothing is remembered. Its rounds of 4,000, 3,000 and
    2,000 tokens are runs with these limits, each from the model of the one before.
    """

    source = "Hou et al. 2025, arXiv 2504.01296; UCSB-NLP-Chang/ThinkPrune@0f7449b local_scripts"
    standing = "code"

    needs = Needs(samples=1)

    limit: PositiveInt | None = Field(
        default=None, description="limit in tokens; rollout.max_new_tokens when left out"
    )

    def rule(self, group: Outcomes) -> FloatArray:
        within = group.lengths <= limit_of(self.limit, group, "limit")
        return (group.right & within).astype(np.float64)

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.limit, rollout.max_new_tokens, "limit")


class Cosine(Plain):
    """The cosine reward: right answers earn less, wrong ones lose less, the longer they are.

        r = last + (first - last) (1 + cos(pi l / max_tokens)) / 2
        r = exceeded if l + margin >= max_tokens, right answers included

    first and last are right_short and right_long, or wrong_short and wrong_long. A truncated
    response counts as wrong, and exceeds. Nothing is remembered. The paper's max_tokens is 14,336.
    TRL's version: right_short 1, right_long 0.5, wrong_short -1, wrong_long -0.5, exceeded left out
    (`null`). The paper's penalty on repetitive wrong answers is not built.
    """

    source = (
        "Yeo et al. 2025, arXiv 2502.03373; eddycmu/demystify-long-cot@e90cf9b "
        "reward/cosine.py:50-110"
    )
    standing = "code"
    wrong_may_win = "a right answer exceeds the limit, and a wrong one does not"
    wrong_may_win_if = "`wrong_short` or `wrong_long` is above `right_short` or `right_long`"

    needs = Needs(samples=1)

    max_tokens: PositiveInt | None = Field(
        default=None, description="limit in tokens; rollout.max_new_tokens when left out"
    )
    right_short: float = Field(default=2.0, description="a right answer of no length")
    right_long: float = Field(default=1.0, description="a right answer at the limit")
    wrong_short: float = Field(default=-10.0, description="a wrong answer of no length")
    wrong_long: float = Field(default=0.0, description="a wrong answer at the limit")
    exceeded: float | None = Field(
        default=-10.0,
        description="reward at the limit, whatever the answer; null: as just below it",
    )
    margin: int = Field(
        default=16, ge=0, description="tokens before the limit from which it counts as exceeded"
    )

    def rule(self, group: Outcomes) -> FloatArray:
        most = limit_of(self.max_tokens, group, "max_tokens")
        first = np.where(group.right, self.right_short, self.wrong_short)
        last = np.where(group.right, self.right_long, self.wrong_long)
        progress = np.minimum(group.lengths, most) / most
        made = last + (first - last) * (1.0 + np.cos(np.pi * progress)) / 2.0
        return (
            made
            if self.exceeded is None
            else np.where(group.lengths + self.margin >= most, self.exceeded, made)
        )

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.max_tokens, rollout.max_new_tokens, "max_tokens")
        most = self.max_tokens or rollout.max_new_tokens
        if self.exceeded is not None and self.margin >= most:
            raise ConfigError(
                f"method.margin: {self.margin} tokens before the limit, {most}, are all of it, "
                "and every response would count as exceeded; set it lower"
            )


class Laser(Plain):
    """LASER: a bonus for right answers within a target length.

        r = 1 + bonus [l <= target] if right, wrong if wrong, unanswered without an answer

    A truncated response has no answer. Nothing is remembered.
    """

    source = (
        "Liu et al. 2025, arXiv 2505.15612; hkust-nlp/Laser@c9e7c4e reward_score/length_penalty.py"
    )
    standing = "code"

    needs = Needs(samples=1)

    target: PositiveInt = Field(
        default=4096, description="target in tokens; the scripts: 2048, 4096, 8192"
    )
    bonus: float = Field(default=0.5, ge=0, description="bonus of a right answer within the target")
    wrong: float = Field(default=-0.5, lt=1, description="reward of a wrong answer")
    unanswered: float = Field(
        default=-1.0, lt=1, description="reward of a response without an answer"
    )

    def rule(self, group: Outcomes) -> FloatArray:
        wrong = np.where(group.answered, self.wrong, self.unanswered)
        return np.where(group.right, 1.0 + self.bonus * (group.lengths <= self.target), wrong)

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.target, rollout.max_new_tokens, "target", strictly=True)


class DLER(Plain):
    """DLER's reward: a right answer within the limit earns 1.

        r = c if l <= limit, else over_limit c

    A wrong or truncated response earns 0. Nothing is remembered. The paper gives right answers over
    the limit 0, its released code 0.1 (`over_limit`, which needs a `limit` below
    rollout.max_new_tokens: a response that reaches that is cut off, and wrong). The rest of the
    recipe is an algorithm: rewards less the group's mean, normalised over the batch (`dr_grpo` with
    `normalize: batch`, `aggregate: token`, `clip_high: 0.28`, `dual_clip: 10`, `kl: k3`, `beta:
    0.0005`, `dynamic_sampling: true`).
    """

    source = "Liu et al. 2025, arXiv 2510.15110, section 3; NVlabs/DLER@ea7d4f7 recipe/dapo"
    standing = "code"

    needs = Needs(samples=1)

    limit: PositiveInt | None = Field(
        default=None,
        description="limit in tokens; rollout.max_new_tokens when left out; the source: 4000",
    )
    over_limit: float = Field(
        default=0.0, ge=0, lt=1, description="reward of a right answer over the limit"
    )

    def rule(self, group: Outcomes) -> FloatArray:
        within = group.lengths <= limit_of(self.limit, group, "limit")
        return np.where(group.right, np.where(within, 1.0, self.over_limit), 0.0)

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.limit, rollout.max_new_tokens, "limit")
        if self.over_limit and (self.limit or rollout.max_new_tokens) == rollout.max_new_tokens:
            raise ConfigError(
                f"method.over_limit: {self.over_limit:g} for right answers over the limit, and "
                f"the limit is rollout.max_new_tokens = {rollout.max_new_tokens}, where a "
                "response is cut off and wrong; set method.limit below that, or leave over_limit "
                "out"
            )


class DADLER(Plain):
    """DA-DLER: DLER's reward with a limit by difficulty.

        r = c [l <= easy if p > threshold, else hard],  p = share of right responses of the group

    A wrong or truncated response earns 0. Nothing is remembered. p counts right answers over the
    limit too; the text leaves that open.
    """

    source = "Liu et al. 2025, arXiv 2510.15110, sections 3.5 and 4.1"
    standing = "text"

    easy: PositiveInt = Field(
        default=2000, description="limit in tokens for prompts above the threshold"
    )
    hard: PositiveInt = Field(default=4000, description="limit in tokens for the others")
    threshold: float = Field(
        default=0.5, ge=0, le=1, description="share of right responses above which one is easy"
    )

    @model_validator(mode="after")
    def _easy_is_not_above_hard(self) -> DADLER:
        if self.easy > self.hard:
            raise ValueError(
                f"method.easy: {self.easy} tokens for easy prompts are more than method.hard = "
                f"{self.hard}"
            )
        return self

    def rule(self, group: Outcomes) -> FloatArray:
        limit = self.easy if group.accuracy > self.threshold else self.hard
        return (group.right & (group.lengths <= limit)).astype(np.float64)

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.hard, rollout.max_new_tokens, "hard")
        check_within(self.easy, rollout.max_new_tokens, "easy")


class StopProperly(Plain):
    """Stop properly: accuracy, and a price on being cut off.

        r = c, and `cut_off` for a truncated response

    A wrong response earns 0. Nothing is remembered. ProRLv2 gives a cut response 0; OpenRLHF a
    fixed value below.
    """

    source = "NVIDIA-NeMo/RL@7ea279a reward_functions.py; OpenRLHF@3c3be62"
    standing = "code"

    needs = Needs(samples=1)

    cut_off: float = Field(default=0.0, le=0, description="reward of a response that was cut off")

    def rule(self, group: Outcomes) -> FloatArray:
        return np.where(group.truncated, self.cut_off, group.right.astype(np.float64))

    def check_algorithm(self, algorithm: Choices) -> None:
        check_no_soft_penalty(algorithm, "stop_properly")
        if algorithm.truncated == "masked":
            raise ConfigError(
                "algorithm.truncated: masked leaves responses that were cut off out of the loss, "
                "and method stop_properly is to teach by them; set algorithm.truncated: wrong"
            )
