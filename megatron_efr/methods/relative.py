"""Credits of a group's own: the method computes the advantages itself, not from one reward per
response.

The algorithm's `baseline` has no effect on them, nor has `normalize: group` or `batch`. `normalize:
tokens` whitens them over the iteration's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.methods.base import Choices, Known, Method, Needs, State
from megatron_efr.methods.plain import Outcomes, check_within, limit_of
from megatron_efr.types import BoolArray, Credit, FloatArray, Graded, Rewarded

EASIER = (1.0, 1.0, 0.75, 0.5)
"""GFPO's adaptive share of `keep`, by quarter of difficulty, the hardest first: 8, 8, 6 and 4 of
16.
"""

REMEMBERED = 10_000
"""Groups whose accuracies GFPO's quarters are made of, at most: the latest."""


class Relative(Method):
    """A method that rewards accuracy, and gives credits of its own."""

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        return Outcomes.of(group, known.limit).right.astype(np.float64)

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        return [
            Credit(self.advantages(Outcomes.of(group.graded, known.limit), known))
            for group in groups
        ]

    def advantages(self, group: Outcomes, known: Known) -> FloatArray:
        """The advantage of each response, float64 [n]; TypeError if the method defines none."""
        raise TypeError(f"{type(self).__name__} defines no advantages")


class TWYN(Relative):
    """TWYN: responses are compared in pairs, with two that never were.

        K right and W wrong ones, among them a right one of infinite and a wrong one of no length
        score = margin W + (right ones longer than this) - (right ones shorter) if right,
            -margin K if wrong
        A = (score - mean) / (std + 1e-6) over all n + 2, sample deviation

    A truncated response counts as wrong; all wrong ones score alike. Nothing is remembered.
    """

    source = "Yang et al. 2025, arXiv 2504.03234; lefttt/TWYN@66711df core_algos.py:156-244"
    standing = "code"

    margin: float = Field(
        default=10.0,
        ge=1,
        description="weight of a pair of right and wrong, in pairs of right ones",
    )

    def advantages(self, group: Outcomes, known: Known) -> FloatArray:
        right = np.concatenate([group.right, [False, True]])
        lengths = np.concatenate([group.lengths, [0.0, np.inf]])
        among = lengths[right]
        longer = (among[None, :] > lengths[:, None]).sum(-1)
        shorter = (among[None, :] < lengths[:, None]).sum(-1)
        scores = np.where(
            right, self.margin * (~right).sum() + longer - shorter, -self.margin * right.sum()
        )
        return ((scores - scores.mean()) / (scores.std(ddof=1) + 1e-6))[:-2]


class GFPO(Relative):
    """GFPO: of many responses the shortest are learnt from, and the others not.

        A = (r - mean) / std over the `keep` responses of least length, or of most reward per token
        A = 0 for the rest
        r = c; population deviation; all 0 if the kept ones earn the same

    A wrong or truncated response earns 0, and may be kept. `adaptive`: hard prompts keep `keep`,
    those of the easier two quarters 3/4 and 1/2 of it; the quarters are those of the accuracies of
    the groups of all iterations before, which are remembered (the latest 10,000), once there were
    `warmup` iterations. The source: 8 of 16, 6 of 16, 4 of 16 (keep of samples), and its own
    reward; `warmup` is this project's. TRL drops the other responses from the batch; they stay in
    its means here.

    The kept ones' advantages sum to 0, so a response earns nothing for being kept. Training then
    does not make responses longer, and it shortens little if the long ones are the wrong ones,
    which are not looked at. With r = c and `reward_per_token` a group of `keep` right responses or
    more teaches nothing, and its wrong ones tie, in the order of sampling.
    """

    source = "Shrivastava et al. 2025, arXiv 2508.09726"
    standing = "text"

    keep: PositiveInt = Field(default=8, description="responses of a prompt that are learnt from")
    by: Literal["length", "reward_per_token"] = Field(
        default="length", description="figure by which they are chosen"
    )
    adaptive: bool = Field(
        default=False, description="fewer of prompts that are easier than others"
    )
    warmup: PositiveInt = Field(
        default=10, description="iterations in which adaptive keeps `keep` of all"
    )

    def advantages(self, group: Outcomes, known: Known) -> FloatArray:
        reward = group.right.astype(np.float64)
        order = group.lengths if self.by == "length" else -reward / group.lengths
        kept = np.argsort(order, kind="stable")[: self._kept(group.accuracy, known)]
        made = np.zeros_like(reward)
        if np.ptp(reward[kept]) > 0:
            made[kept] = (reward[kept] - reward[kept].mean()) / reward[kept].std()
        return made

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        if not self.adaptive:
            return state
        solved = [float(group.rewards.mean()) for group in groups]
        return {
            "iterations": state.get("iterations", 0) + 1,
            "solved": [*state.get("solved", []), *solved][-REMEMBERED:],
        }

    def check(self, rollout: RolloutConfig) -> None:
        if self.keep >= rollout.samples:
            raise ConfigError(
                f"method.keep: {self.keep} of rollout.samples = {rollout.samples} responses "
                "leaves none out; set it lower"
            )

    @property
    def equal_rewards_teach(self) -> bool:
        return False

    def _kept(self, accuracy: float, known: Known) -> int:
        if not self.adaptive or known.state.get("iterations", 0) < self.warmup:
            return self.keep
        quarter = int(
            np.searchsorted(np.quantile(known.state["solved"], [0.25, 0.5, 0.75]), accuracy)
        )
        return max(1, round(EASIER[quarter] * self.keep))


class DRPO(Relative):
    """DRPO: right answers pull by their brevity, wrong ones push by their likelihood, each among
    their own.

        A_i = n w_i if right,  w_i = exp((1 - l_i / max_tokens) / spread) over its sum over the
            right
        A_i = -n softmax(s / tau)_i over the wrong,  s = mean log-prob of a response's tokens
        0 if all are right, or all wrong

    A truncated response counts as wrong. Nothing is remembered. The source's loss has s in place of
    a ratio, as has `algorithm.name: likelihood`; the factor n makes of a mean over responses, which
    is asked for (`algorithm.aggregate: sequence`), the source's mean over prompts. s is taken when
    a response is drawn: tau makes little of what an update changes. The source's penalty on the KL
    between updates of an iteration is not built.
    """

    source = "Optimization-AI, arXiv 2510.04474; Optimization-AI/DRPO@405f702 core_algos.py:337-436"
    standing = "code"

    needs = Needs(aggregate="sequence")

    spread: float = Field(
        default=0.1, gt=0, description="less prefers short answers more; the source's lambda"
    )
    tau: float = Field(
        default=10.0, gt=0, description="less pushes the likeliest wrong answers alone"
    )
    max_tokens: PositiveInt | None = Field(
        default=None, description="limit in tokens; rollout.max_new_tokens when left out"
    )

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        return [
            Credit(self._pulled(group, Outcomes.of(group.graded, known.limit))) for group in groups
        ]

    @property
    def equal_rewards_teach(self) -> bool:
        return False

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.max_tokens, rollout.max_new_tokens, "max_tokens")

    def _pulled(self, group: Rewarded, seen: Outcomes) -> FloatArray:
        count = len(seen.right)
        right = seen.right
        if right.all() or not right.any():
            return np.zeros(count)
        brevity = -seen.lengths / (limit_of(self.max_tokens, seen, "max_tokens") * self.spread)
        drawn = [response.logprobs[response.trained] for response in group.group.responses]
        likely = np.array([each.mean(dtype=np.float64) for each in drawn]) / self.tau
        return count * (_softmax(brevity, right) - _softmax(likely, ~right))


class GDPO(Relative):
    """GDPO: accuracy and brevity are normalised each for itself before they are added.

        A = correct z(c) + short z([l <= limit]),
            z = (r - mean) / (std + 1e-6) in the group, sample deviation
        A is then normalised over the iteration: its responses (sample deviation + 1e-4),
            its tokens, or not

    Brevity is paid to wrong responses too. A truncated response is wrong. Nothing is remembered. So
    neither reward drowns the other. TRL and the authors' TRL fork normalise over responses, verl
    and the authors' verl fork over tokens (`over: tokens`). The limit of 4,000 is this project's.
    """

    source = "arXiv 2601.05242; NVlabs/GDPO@b080e63"
    standing = "code"
    wrong_may_win = (
        "a wrong answer is within the limit, a right one is not, and the share of those within it "
        "is further from 1/2 than that of the right ones"
    )
    wrong_may_win_if = "`short` is above `correct`"

    limit: PositiveInt = Field(default=4000, description="tokens of a brief response")
    correct: float = Field(default=1.0, ge=0, description="weight of accuracy")
    short: float = Field(default=1.0, ge=0, description="weight of brevity")
    over: Literal["responses", "tokens", "nothing"] = Field(
        default="responses", description="what is normalised over"
    )

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        seen = [Outcomes.of(group.graded, known.limit) for group in groups]
        made = [self.advantages(each, known) for each in seen]
        flat, lengths = np.concatenate(made), np.concatenate([each.lengths for each in seen])
        if self.over == "responses" and len(flat) > 1:
            flat = (flat - flat.mean()) / (flat.std(ddof=1) + 1e-4)
        if self.over == "tokens":
            tokens = lengths.sum()
            mean = (flat * lengths).sum() / tokens
            variance = ((flat - mean) ** 2 * lengths).sum() / max(tokens - 1.0, 1.0)
            flat = (flat - mean) / np.sqrt(variance + 1e-8)
        return [
            Credit(part) for part in np.split(flat, np.cumsum([len(each) for each in made])[:-1])
        ]

    def advantages(self, group: Outcomes, known: Known) -> FloatArray:
        brief = (group.lengths <= self.limit).astype(np.float64)
        return self.correct * _z(group.right.astype(np.float64)) + self.short * _z(brief)

    def check(self, rollout: RolloutConfig) -> None:
        check_within(self.limit, rollout.max_new_tokens, "limit", strictly=True)

    def check_algorithm(self, algorithm: Choices) -> None:
        if algorithm.normalize == "tokens" and self.over != "nothing":
            raise ConfigError(
                "algorithm.normalize: tokens would normalise over the iteration what method gdpo "
                f"has normalised over its {self.over}; set method.over: nothing, or "
                "algorithm.normalize: none"
            )


class QGLAS(Relative):
    """QGLAS: right answers that are shorter than their mean get a bonus on their advantage.

        a = c - mean c;  ref = mean length of those with a > 0
        h = clip((ref - l) / ref, 0, clip) / clip if a > 0, else 0
        A = a + (max c - Q25 c) (low + (high - low) (1 - s)) h
        s = spread of the rewards with a > 0, as a share of max c - Q25 c, at most 1

    No sign is ever turned: a wrong or truncated response keeps its advantage, and so does a long
    right one. Nothing is remembered. Rewards are right or wrong here, so that s is 0.
    """

    source = "QGLAS 2026, eq. 1-9"
    standing = "text"

    low: float = Field(default=0.3, ge=0, description="least weight of the bonus")
    high: float = Field(default=0.6, ge=0, description="largest weight of the bonus")
    clip: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="saving, as a share of the mean, with the whole bonus",
    )

    @model_validator(mode="after")
    def _low_is_not_above_high(self) -> QGLAS:
        if self.low > self.high:
            raise ValueError(f"method.low: {self.low:g} is above method.high = {self.high:g}")
        return self

    @property
    def equal_rewards_teach(self) -> bool:
        return False

    def advantages(self, group: Outcomes, known: Known) -> FloatArray:
        return qglas_advantages(
            group.right.astype(np.float64), group.lengths, self.low, self.high, self.clip
        )


def qglas_advantages(
    rewards: FloatArray, lengths: FloatArray, low: float, high: float, clip: float
) -> FloatArray:
    """QGLAS' advantages of any rewards [n], such as scores between 0 and 1."""
    above = rewards - rewards.mean()
    positive = above > 0
    if not positive.any():
        return above
    reference = lengths[positive].mean()
    saving = np.where(
        positive, np.clip((reference - lengths) / (reference + 1e-8), 0.0, clip) / clip, 0.0
    )
    spread = rewards.max() - np.percentile(rewards, 25)
    share = np.clip(np.ptp(rewards[positive]) / (spread + 1e-8), 0.0, 1.0)
    return above + spread * (low + (high - low) * (1.0 - share)) * saving


def _z(values: FloatArray) -> FloatArray:
    return (values - values.mean()) / (values.std(ddof=1) + 1e-6)


def _softmax(values: FloatArray, among: BoolArray) -> FloatArray:
    """The softmax among some of the values, at least one; 0 elsewhere."""
    made = np.exp(np.where(among, values - values[among].max(), -np.inf))
    return made / made.sum()
