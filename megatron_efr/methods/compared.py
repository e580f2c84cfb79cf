"""Compared with the starting model: a response is measured by what that model answers to the same
prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field, PositiveInt

from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.methods.base import Ask, Known, Method, Needs, Visit
from megatron_efr.methods.plain import Outcomes
from megatron_efr.methods.samplings import Samplings
from megatron_efr.scripts import Opened
from megatron_efr.types import BoolArray, Credit, FloatArray, Graded, Group, Rewarded


class O1Pruner(Method):
    """O1-Pruner, off-line as released: the starting model's own responses, weighed by length and
    accuracy.

        w = clip((mean l - l) / l + alpha (c - p), least, most),
            mean l, p = over all responses of the prompt
        A = (w - mean w) / std w,  over the trained responses of all prompts, population deviation

    The first `trained` responses of each prompt are trained on, which are as good as any, since all
    are drawn alike. A wrong or truncated response has c = 0. Nothing is remembered. The run has one
    iteration, whose responses are the starting model's, with all prompts in it (`rollout.prompts`)
    and as many updates as one pass over them is to have; ratios are then to the starting model.

    The released code takes them of whole sequences, clipped at 0.2, without a KL: `algorithm:
    {name: gspo, clip_low: 0.2, clip_high: 0.2}`. It draws 12 responses (`rollout.samples`); the
    paper has alpha 2 and 5.
    """

    source = (
        "Luo et al. 2025, arXiv 2501.12570; StarDewXXX/O1-Pruner@04c0863 construct_dataset.py, "
        "wsft/trainer.py"
    )
    standing = "code"
    wrong_may_win = (
        "it is shorter, by so much that mean l / l is more than alpha (5) above the right one's"
    )

    needs = Needs(offline=True)

    alpha: float = Field(default=5.0, ge=0, description="weight of accuracy beside length")
    least: float = Field(default=-2.0, description="lower bound of w")
    most: float = Field(default=4.0, description="upper bound of w")
    trained: PositiveInt = Field(default=2, description="responses of a prompt that are trained on")

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        return np.clip(
            gain(seen, seen.lengths.mean(), seen.accuracy, self.alpha), self.least, self.most
        )

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        trained = np.concatenate([group.rewards[: self.trained] for group in groups])
        mean = trained.mean()
        std = trained.std()
        scale = 1.0 / std if std > 1e-9 else 0.0  # equal ones differ by rounding
        return [
            Credit(
                (group.rewards - mean) * scale, masked=np.arange(len(group.rewards)) >= self.trained
            )
            for group in groups
        ]

    def check(self, rollout: RolloutConfig) -> None:
        check_bounds(self.least, self.most)
        if self.trained > rollout.samples:
            raise ConfigError(
                f"method.trained: {self.trained} responses of a prompt, and rollout.samples = "
                f"{rollout.samples}"
            )


def check_bounds(least: float, most: float) -> None:
    """Refuse, with a ConfigError, bounds between which nothing lies."""
    if least >= most:
        raise ConfigError(f"method.least: {least:g} is not below method.most = {most:g}")


class AdaptThink(Method):
    """AdaptThink: some responses to a prompt must not think; each is compared with the starting
    model, which thinks.

        A = c - p_ref + delta [it does not think],
            p_ref = share of right ones among the starting model's responses

    Of a prompt's responses, `share` open with the mark that closes a thought, the others with
    `word`: tokens that are trained on, with `share`, or what is left of 1, for the chance that they
    had. c = 0 for a wrong and for a truncated response, and unless the closing mark stands in it
    exactly once, and the opening one not at all. Nothing is remembered but p_ref, of `reference`
    responses before the first iteration, which the run keeps.

    The released loss is PPO's clip on the ratio of whole sequences (`algorithm: {name: gspo,
    clip_low: 0.2, clip_high: 0.2}`), the paper's on that of tokens (`algorithm: {name: grpo, kl:
    none}`).
    """

    source = (
        "Zhang et al. 2025, arXiv 2505.13417; THU-KEG/AdaptThink@84cf948 "
        "adapt_think_reward_manager.py:172-211"
    )
    standing = "code"
    wrong_may_win = (
        "it does not think, and the right one does, and closes its thought not once or opens one"
    )
    wrong_may_win_if = "`delta` is above 1"

    needs = Needs(thinking=True)

    delta: float = Field(default=0.05, ge=0, description="reward of not thinking")
    share: float = Field(
        default=0.5, gt=0, lt=1, description="share of a prompt's responses that do not think"
    )
    word: str = Field(
        default="Alright", min_length=1, description="first token of the responses that think"
    )
    brief: PositiveInt = Field(
        default=4096, description="tokens of a response that does not think, at most"
    )
    reference: PositiveInt = Field(
        default=16, description="responses of the starting model to each prompt"
    )

    @property
    def samplings(self) -> Samplings:
        return Samplings(reference=self.reference)

    @property
    def single(self) -> Mapping[str, str]:
        return {"word": self.word}

    def ask(self, visit: Visit, known: Known) -> Ask:
        assert known.marks is not None  # or the run would have been refused
        closed = Opened(opening=known.marks.closes, chance=self.share, limit=self.brief)
        thinks = Opened(opening=self.word, chance=1.0 - self.share)
        brief = self._brief(visit.samples)
        return Ask(scripts=(closed,) * brief + (thinks,) * (visit.samples - brief))

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        right = Outcomes.of(group, known.limit).right & self._formed(group.group, known)
        brief = np.arange(len(right)) < self._brief(len(right))
        return right - known.reference[group.group.prompt.id].solved + self.delta * brief

    def credits(self, groups: Sequence[Rewarded], known: Known) -> Sequence[Credit]:
        return [Credit(group.rewards) for group in groups]

    def check(self, rollout: RolloutConfig) -> None:
        if not 0 < self._brief(rollout.samples) < rollout.samples:
            raise ConfigError(
                f"method.share: {self.share:g} of rollout.samples = {rollout.samples} responses "
                "leaves none that does not think, or none that does; take more samples"
            )

    def _brief(self, samples: int) -> int:
        """The responses that do not think: the first of a prompt's."""
        return round(samples * self.share)

    def _formed(self, group: Group, known: Known) -> BoolArray:
        """Responses whose thought is closed once, and not opened, bool [n]."""
        assert known.marks is not None
        opens, closes = known.marks
        texts = [response.text for response in group.responses]
        return np.array(
            [text.count(closes) == 1 and not (opens and opens in text) for text in texts],
            dtype=bool,
        )


def gain(group: Outcomes, length: float, accuracy: float, alpha: float) -> FloatArray:
    """Gain of responses over others of that mean length and accuracy, [n]: O1-Pruner's reward."""
    return (length - group.lengths) / group.lengths + alpha * (group.right - accuracy)
