"""Modes that the model chooses: the text shows if a response thinks, or how hard it says the
problem is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from megatron_efr.methods.base import Ask, Known, Method, Needs, Visit
from megatron_efr.methods.plain import Outcomes
from megatron_efr.scripts import Opened
from megatron_efr.types import BoolArray, Credit, FloatArray, Graded, Group, Rewarded


class AutoThink(Method):
    """AutoThink: a thought that begins with an ellipsis, which the model goes on with or closes at
    once.

        base = 1 right, 0 wrong if it thinks;  2 right, -1 wrong if it does not
        stage 1: base of a mode moves to 0, -1 (thinks) or 1,
            -2 (does not) by clip(slope (share - balance), 0, 1),
                 share = of the iteration's responses in that mode
        stage 2: base
        stage 3: base + exp(-decay z) - 1 if right, base + 1 - exp(-decay z) if wrong,
                 z = (l - mean) / std among the group's right, or wrong, responses,
                     sample deviation; 0 for a single one

    A truncated response counts as wrong. Nothing is remembered; its stages are runs, each from the
    model of the one before. The released code takes 2 from repetitive responses of negative reward;
    that is not built.
    """

    source = "Tu et al. 2025, arXiv 2505.10832; TU2021/AutoThink@be0bcb0 main_ppo.py:40-130"
    standing = "code"
    wrong_may_win_if = "`stage` is 3, and `decay` times the root of rollout.samples is above 0.69"

    stage: Literal[1, 2, 3] = Field(default=1, description="stage of the method's three")
    balance: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of a mode above which it earns less in stage 1",
    )
    slope: float = Field(default=2.0, ge=0, description="rate at which it earns less")
    decay: float = Field(default=0.05, ge=0, description="weight of the length in stage 3")
    opening: str = Field(
        default="...\n", min_length=1, description="what a thought begins with; not trained on"
    )
    end: str = Field(default="</think>", min_length=1, description="what closes a thought")

    @property
    def sought(self) -> Mapping[str, str]:
        return {"opening": self.opening, "end": self.end}

    def ask(self, visit: Visit, known: Known) -> Ask:
        return Ask(scripts=(Opened(opening=self.opening),) * visit.samples)

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        right = Outcomes.of(group, known.limit).right
        return np.where(
            self._thinks(group.group), np.where(right, 1.0, 0.0), np.where(right, 2.0, -1.0)
        )

    def settle(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Rewarded]:
        if self.stage == 2:
            return groups
        if self.stage == 3:
            return [self._by_length(group, known) for group in groups]
        share = float(np.concatenate([self._thinks(group.group) for group in groups]).mean())
        return [self._balanced(group, share, known) for group in groups]

    @property
    def equal_rewards_teach(self) -> bool:
        return self.stage == 3

    def _balanced(self, group: Rewarded, share: float, known: Known) -> Rewarded:
        thinks = self._thinks(group.group)
        right = Outcomes.of(group.graded, known.limit).right
        pull = np.clip(self.slope * (np.where(thinks, share, 1.0 - share) - self.balance), 0.0, 1.0)
        least = np.where(thinks, np.where(right, 0.0, -1.0), np.where(right, 1.0, -2.0))
        return replace(group, rewards=(1.0 - pull) * group.rewards + pull * least)

    def _by_length(self, group: Rewarded, known: Known) -> Rewarded:
        seen = Outcomes.of(group.graded, known.limit)
        made = group.rewards.copy()
        for among, sign in ((seen.right, 1.0), (~seen.right, -1.0)):
            if among.sum() > 1:
                lengths = seen.lengths[among]
                z = (lengths - lengths.mean()) / max(float(lengths.std(ddof=1)), 1e-6)
                made[among] += sign * (np.exp(-self.decay * z) - 1.0)
        return replace(group, rewards=made)

    def _thinks(self, group: Group) -> BoolArray:
        """Responses whose thought goes on behind the opening, bool [n]."""
        said = [response.text.removeprefix(self.opening).lstrip() for response in group.responses]
        return np.array([not text.startswith(self.end) for text in said], dtype=bool)


class Thinkless(Method):
    """Thinkless (DeGRPO): the first token says whether to think, and is trained apart from the
    rest.

        r = 1 if right and short, thinking if right and it thinks, -1 if wrong,
            or without either token
        A = r - mean r of the group
        loss = control times the mean over first tokens + the mean over all others

    A truncated response counts as wrong. Nothing is remembered. The model has to know both tokens,
    by SFT before. The weights make this of a mean over tokens, which is asked for
    (`algorithm.aggregate: token`), with the iteration's mean length for that of each of its
    updates. The source clips at 0.2, and has a KL of 0.001 in the loss.
    """

    source = (
        "Fang et al. 2025, arXiv 2505.13379; VainF/Thinkless@aa225d2 math_reward.py:36-110, "
        "core_algos.py:112-214"
    )
    standing = "code"
    wrong_may_win_if = "`thinking` is below -1"

    needs = Needs(aggregate="token")

    thinking: float = Field(
        default=0.5, le=1, description="reward of a right answer after a thought"
    )
    control: float = Field(
        default=0.001, gt=0, description="weight of the first tokens beside all others"
    )
    short: str = Field(
        default="<short>", min_length=1, description="the token that opens a brief answer"
    )
    think: str = Field(
        default="<think>", min_length=1, description="the token that opens a thought"
    )

    @model_validator(mode="after")
    def _tokens_differ(self) -> Thinkless:
        check_differ(self.short, self.think, "short", "think")
        return self

    @property
    def sought(self) -> Mapping[str, str]:
        return {"short": self.short, "think": self.think}

    @property
    def single(self) -> Mapping[str, str]:
        return self.sought

    @property
    def equal_rewards_teach(self) -> bool:
        return False

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        right = Outcomes.of(group, known.limit).right
        said = [response.text.lstrip() for response in group.group.responses]
        short = np.array([text.startswith(self.short) for text in said], dtype=bool)
        think = np.array([text.startswith(self.think) for text in said], dtype=bool)
        return np.where(right & short, 1.0, np.where(right & think, self.thinking, -1.0))

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        responses = [response for group in groups for response in group.group.responses]
        tokens = sum(response.length for response in responses)
        first = len(responses)
        control, rest = self.control * tokens / first, tokens / max(tokens - first, 1)
        centred = [group.rewards - group.rewards.mean() for group in groups]
        weights = [_weights(group.group, control, rest) for group in groups]
        return [
            Credit(advantage, weight=weight)
            for advantage, weight in zip(centred, weights, strict=True)
        ]


class AdaCtrl(Method):
    """AdaCtrl: the answer opens with [Easy] or [Hard], and is held to be brief if it says Easy.

        a group is easy if p > threshold,  p = share of right responses
        r = c + tag T + length S
        T = 1 if it says what the group is, 0 if it says the other, -1 if it says nothing
        S = (1 + cos(pi l / lmax)) / 2 if it says Easy and is right, else 0;
            lmax = the longest of the group

    A wrong or truncated response gets T alone. Nothing is remembered. The model has to know the
    tags, by SFT before.
    """

    source = "Huang et al. 2025, arXiv 2505.18822; JoeYing1019/AdaCtrl@9a0b89f naive.py:85-204"
    standing = "code"
    wrong_may_win_if = "`tag` is above 0.5"

    threshold: float = Field(
        default=0.625, ge=0, le=1, description="share of right responses above which one is easy"
    )
    tag: float = Field(default=0.5, ge=0, description="weight of the tag")
    length: float = Field(default=0.5, ge=0, description="weight of the length")
    easy: str = Field(default="[Easy]", min_length=1, description="the tag of easy problems")
    hard: str = Field(default="[Hard]", min_length=1, description="the tag of hard problems")

    @model_validator(mode="after")
    def _tags_differ(self) -> AdaCtrl:
        check_differ(self.easy, self.hard, "easy", "hard")
        return self

    @property
    def sought(self) -> Mapping[str, str]:
        return {"easy": self.easy, "hard": self.hard}

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        said = [response.text.lstrip() for response in group.group.responses]
        easy = np.array([text.startswith(self.easy) for text in said], dtype=bool)
        hard = np.array([text.startswith(self.hard) for text in said], dtype=bool)
        held = easy if seen.accuracy > self.threshold else hard
        tags = np.where(held, 1.0, np.where(easy | hard, 0.0, -1.0))
        brief = (1.0 + np.cos(np.pi * seen.lengths / seen.lengths.max())) / 2.0
        return seen.right + self.tag * tags + self.length * np.where(easy & seen.right, brief, 0.0)


def check_differ(one: str, other: str, key: str, other_key: str) -> None:
    """Refuse, with a ValueError, two texts of which a response may begin with both."""
    if one.startswith(other) or other.startswith(one):
        raise ValueError(
            f"method.{other_key}: {other!r} cannot be told from method.{key} = {one!r}"
        )


def _weights(group: Group, first: float, rest: float) -> tuple[FloatArray, ...]:
    """The weight of each response's first token, and of its others."""
    made = [np.full(len(response.tokens), rest) for response in group.responses]
    for weights in made:
        weights[0] = first
    return tuple(made)
