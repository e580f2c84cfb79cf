"""Open in part: methods whose sources leave something out. Each says what is open, and what is
chosen here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config import RolloutConfig
from megatron_efr.methods.base import Ask, Known, Method, Needs, State, Visit
from megatron_efr.methods.compared import check_bounds, gain
from megatron_efr.methods.efr import efr_rewards
from megatron_efr.methods.plain import Outcomes, Plain, tells
from megatron_efr.methods.samplings import Monitor, Samplings
from megatron_efr.types import BoolArray, FloatArray, Graded, IntArray, Rewarded

LEVELS = ("low", "medium", "high")


class ALP(Plain):
    """ALP: a price on tokens that grows with how often the prompt is solved.

        r = c - beta l max(p, 1 / n),  p = share of right responses of the group

    Wrong and truncated responses pay alike. Nothing is remembered. Open: whether lengths are
    divided by a normaliser; readers of the paper differ. Chosen: none, with the beta of 1e-7 per
    token that they agree on, which is little next to a reward of 1 unless the algorithm divides by
    the group's spread.
    """

    source = "Xiang et al. 2025, arXiv 2506.05256, second-hand"
    wrong_may_win = (
        "a right answer is 1 / (beta max(p, 1 / n)) tokens longer than a wrong one: 10,000,000 by "
        "default"
    )

    beta: float = Field(
        default=1e-7, ge=0, description="price of a token of a prompt that is always solved"
    )

    def rule(self, group: Outcomes) -> FloatArray:
        solved = max(group.accuracy, 1.0 / len(group.right))
        return group.right - self.beta * group.lengths * solved


class GR3(Plain):
    """GR3: the reward divided by a response's length in means of its group.

        r = c / (1 + alpha l / mean l)

    A wrong or truncated response earns 0, and its length is in the mean. Nothing is remembered.
    Open: the authors' code. Chosen: the equations as another paper restates them, and its alpha for
    verified rewards.
    """

    source = "arXiv 2603.10535, as restated in QGLAS, appendix A.2"

    alpha: float = Field(default=0.33, ge=0, description="price of length: larger is briefer")

    def rule(self, group: Outcomes) -> FloatArray:
        return np.where(
            group.right, 1.0 / (1.0 + self.alpha * group.lengths / group.lengths.mean()), 0.0
        )


class Target(Method):
    """A target accuracy: as brief as the accuracy on held-out problems allows, without a choice of
    alpha.

        r = efr's, with the alpha of the moment
        alpha = min(alpha + up, most) after a sampling with accuracy >= that of the start -
            tolerance,
                max(alpha - down, 0) after any other

    `prompts` problems of evaluation.datasets are sampled before the first iteration, which is the
    start, and after every `every`. The accuracy of 100 problems x 4 responses is known to about 2
    points, and such is `tolerance`. A wrong or truncated response earns 0. alpha, the accuracy of
    the start and the last sampling are remembered; alpha is in the metrics (`method/alpha`), beside
    `monitor/accuracy`.

    Open: it is this project's own, and how it compares with the best of fixed alphas is not known.
    Chosen: a step of 0.05 up, and one of twice that down.
    """

    source = "this project; its reward is Arora & Zanette 2025, arXiv 2502.04463, eq. 4 and 5"

    alpha: float = Field(default=0.0, ge=0, lt=1, description="starting alpha")
    most: float = Field(default=0.9, ge=0, lt=1, description="the largest alpha")
    up: float = Field(
        default=0.05, gt=0, lt=1, description="step by which alpha rises while accuracy holds"
    )
    down: float = Field(
        default=0.1, gt=0, lt=1, description="step by which alpha falls if it does not"
    )
    tolerance: float = Field(
        default=0.02, ge=0, le=1, description="accuracy that may be lost against the start"
    )
    prompts: PositiveInt = Field(
        default=100, description="held-out problems that are watched, at most"
    )
    monitor_samples: PositiveInt = Field(default=4, description="responses to each of them")
    every: PositiveInt = Field(default=10, description="iterations between samplings")

    @model_validator(mode="after")
    def _begins_below_the_most(self) -> Target:
        if self.alpha > self.most:
            raise ValueError(f"method.alpha: {self.alpha:g} is above method.most = {self.most:g}")
        return self

    @property
    def samplings(self) -> Samplings:
        return Samplings(
            monitor=Monitor(self.prompts, self.monitor_samples, self.every, held_out=True)
        )

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        return efr_rewards(seen.right, seen.lengths, self._followed(known.state, known)["alpha"])

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        return self._followed(state, known)

    def _followed(self, state: State, known: Known) -> State:
        """The state once the last sampling that is known has been looked at: at once, and once
        only.
        """
        if known.monitored is None or known.monitored <= state.get("looked", -1):
            return state or {"alpha": self.alpha}
        accuracy = float(np.mean([each.solved for each in known.monitor.values()]))
        alpha, start = state.get("alpha", self.alpha), state.get("start", accuracy)
        if "start" in state:
            # shares that differ by the tolerance do not round
            held = accuracy >= start - self.tolerance - 1e-9
            alpha = min(alpha + self.up, self.most) if held else max(alpha - self.down, 0.0)
        return {"alpha": alpha, "start": start, "looked": known.monitored}


class O1PrunerOnline(Method):
    """O1-Pruner on-line: the policy's own responses, against the starting model's lengths and
    accuracy.

        r = clip((L - l) / l + alpha (c - p), least, most),
            L, p = mean length and share of right of the starting model

    A wrong or truncated response has c = 0, and its length counts. Nothing is remembered but L and
    p, of `reference` responses before the first iteration, which the run keeps. Open: the paper
    says so, its code learns off-line alone. Chosen: the off-line form's reward and bounds, with the
    algorithm's own baseline and loss.
    """

    source = (
        "Luo et al. 2025, arXiv 2501.12570, with StarDewXXX/O1-Pruner@04c0863 construct_dataset.py"
    )
    wrong_may_win = (
        "it is shorter, by so much that L / l is more than alpha (5) above the right one's"
    )

    alpha: float = Field(default=5.0, ge=0, description="weight of accuracy beside length")
    least: float = Field(default=-2.0, description="lower bound of the reward")
    most: float = Field(default=4.0, description="upper bound of the reward")
    reference: PositiveInt = Field(
        default=12, description="responses of the starting model to each prompt"
    )

    @property
    def samplings(self) -> Samplings:
        return Samplings(reference=self.reference)

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        before = known.reference[group.group.prompt.id]
        gained = gain(
            Outcomes.of(group, known.limit), before.mean_length, before.solved, self.alpha
        )
        return np.clip(gained, self.least, self.most)

    def check(self, rollout: RolloutConfig) -> None:
        check_bounds(self.least, self.most)


class SelfBudgeter(Method):
    """SelfBudgeter: a response first says how many tokens it will take, and is held to that.

        r = over [b > most] + low + (high - low) (1 + cos(pi |l - b| / (b slack))) / 2 if |l - b|
            <= slack b, else low
        b = the budget that it says;  low, high = 0.5, 1 if right, -0.5, 0 if wrong;
            r = unformed if it says none

    A truncated response counts as wrong. Nothing is remembered. The model has to know the tag, by
    SFT before. Open: the cosine's argument, the slack, and the largest budget. Chosen: the relative
    difference over the slack, 1, and no largest budget.
    """

    source = "Li et al. 2025, arXiv 2505.11274 v6, second-hand"
    wrong_may_win = "the right one says no budget"

    slack: float = Field(
        default=1.0, gt=0, description="difference from the budget, in budgets, that earns least"
    )
    most: PositiveInt | None = Field(
        default=None, description="the largest budget in tokens; none when left out"
    )
    over: float = Field(default=-0.4, le=0, description="reward if the budget is larger than that")
    unformed: float = Field(
        default=-1.0, le=0, description="reward of a response that says no budget"
    )
    tag: Annotated[str, tells("budget")] = Field(
        default="<budget>{budget}</budget>", description="what a response begins with"
    )

    @property
    def sought(self) -> Mapping[str, str]:
        return {"tag": self.tag.replace("{budget}", "5")}

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen, opens, closes = Outcomes.of(group, known.limit), *self.tag.split("{budget}", 1)
        pattern = re.compile(rf"\s*{re.escape(opens)}\s*([1-9]\d{{0,8}})\s*{re.escape(closes)}")
        found = [pattern.match(response.text) for response in group.group.responses]
        said = np.array([0.0 if match is None else float(match[1]) for match in found])
        away = np.abs(seen.lengths - said) / np.maximum(said, 1.0) / self.slack
        kept = np.where(away <= 1.0, (1.0 + np.cos(np.pi * np.minimum(away, 1.0))) / 4.0, 0.0)
        over = 0.0 if self.most is None else self.over * (said > self.most)
        return np.where(said > 0, np.where(seen.right, 0.5, -0.5) + kept + over, self.unformed)


class AdaCoT(Method):
    """AdaCoT: to think costs if it is not needed, and not to think if it is.

        r = c - missed if it does not think and the prompt needs it,
            c - needless if it thinks and it does not, else c
        a prompt needs it if fewer than `enough` of the group's responses that do not think are
            right, or none is there

    A response does not think if its thought is closed at once. A wrong or truncated response has c
    = 0. Nothing is remembered. From iteration `masked_from` on, the token that decides is left out
    of the loss, the others are trained on as before: the source's selective loss masking, which
    keeps a later stage from deciding always alike.

    Open: the coefficients, which prompts need a thought, for which the source asks another model,
    and when the later stage begins. Chosen: 0.3 and 0.1, the group itself, and no later stage; no
    price on form, which the verifier judges; no critic.
    """

    source = "Lou et al. 2025, arXiv 2505.11896, second-hand"
    wrong_may_win_if = "`missed` or `needless` is above 1"

    needs = Needs(thinking=True)

    missed: float = Field(default=0.3, ge=0, description="what a missing thought costs")
    needless: float = Field(default=0.1, ge=0, description="what a needless thought costs")
    enough: float = Field(
        default=0.5, ge=0, le=1, description="share of right answers without a thought"
    )
    masked_from: PositiveInt | None = Field(
        default=None,
        description=(
            "iteration from which the token that decides is not trained on; never when left out"
        ),
    )
    decides: int = Field(
        default=0,
        ge=0,
        description=(
            "its place in a response: 0 where the chat template opens the thought, 1 behind a "
            "`<think>` that the model draws"
        ),
    )

    @model_validator(mode="after")
    def _place_is_asked_for(self) -> AdaCoT:
        if self.masked_from is None:
            self.refuse_idle("method", ["decides"], "without method.masked_from")
        return self

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        right = Outcomes.of(group, known.limit).right
        thinks = self._thinks(group, known)
        needed = thinks.all() or float(right[~thinks].mean()) < self.enough
        return right - (self.missed * ~thinks if needed else self.needless * thinks)

    def weights(self, group: Rewarded, known: Known) -> tuple[FloatArray, ...] | None:
        if self.masked_from is None or known.step < self.masked_from:
            return None
        made = tuple(np.ones(len(response.tokens)) for response in group.group.responses)
        for weights in made:
            weights[self.decides : self.decides + 1] = 0.0
        return made

    def _thinks(self, group: Graded, known: Known) -> BoolArray:
        """Responses whose thought is not closed at once, bool [n]."""
        assert known.marks is not None  # or the run would have been refused
        opens, closes = known.marks
        said = [
            response.text.lstrip().removeprefix(opens).lstrip()
            for response in group.group.responses
        ]
        return np.array([not text.startswith(closes) for text in said], dtype=bool)


class MemoryR(Method):
    """Memory-R+: a response earns for being near to what was right before, and unlike what was
    wrong.

        r = c + exploit scaled(-|e - mean of the prompt's right e|) + explore scaled(1 - largest
            cosine to its wrong e)
        e = a response's embedding;  scaled(x) = where x lies between least and most of the last
            `window` values, 0 to 1

    Either part is 0 until the prompt has had a right, or a wrong, response in an earlier iteration,
    and the second until iteration `explore_from`. A truncated response counts as wrong; a wrong one
    gets both parts. The mean of each prompt's right embeddings, its last `kept` wrong ones, and the
    last values are remembered: 12 MB of a checkpoint by default, of the first `remembered` prompts
    that have a right, or a wrong, response.

    For the others such a part stays 0. The first are kept, not the latest: an epoch of more prompts
    would forget each before it comes again. It is not about length.

    Open: little; the source embeds with a model of sentences. Chosen: counts of runs of three
    tokens, hashed, so that nothing is to be loaded, a memory that takes a response in after it was
    judged, not before, and its bound.
    """

    source = "Le et al. 2025, arXiv 2504.02273, sections 2.2 and 2.3; thaihungle/Memory-R@a193f4f"
    wrong_may_win = "it is less like earlier wrong ones, or nearer to earlier right ones"

    exploit: float = Field(default=1.0, ge=0, description="weight of being near to right ones")
    explore: float = Field(default=1.0, ge=0, description="weight of being unlike wrong ones")
    explore_from: PositiveInt = Field(
        default=50, description="iteration from which the second counts"
    )
    window: PositiveInt = Field(default=100, description="values that each part is scaled by")
    kept: PositiveInt = Field(default=8, description="wrong responses that are kept of a prompt")
    size: PositiveInt = Field(default=64, description="numbers of an embedding")
    remembered: PositiveInt = Field(
        default=4000, description="prompts that are remembered: the first that are seen"
    )

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        near, unlike = self._parts(group, self._embedded(group), known.state)
        explore = self.explore if known.step >= self.explore_from else 0.0
        scaled = [
            self._scaled(each, known.state.get(name, []))
            for name, each in (("near", near), ("unlike", unlike))
        ]
        return (
            Outcomes.of(group, known.limit).right + self.exploit * scaled[0] + explore * scaled[1]
        )

    def learn(self, state: State, groups: Sequence[Rewarded], known: Known) -> State:
        near, unlike = list(state.get("near", [])), list(state.get("unlike", []))
        right, wrong = dict(state.get("right", {})), dict(state.get("wrong", {}))
        for group in groups:
            made = self._embedded(group.graded)
            parts = self._parts(group.graded, made, state)
            for values, held in zip(parts, (near, unlike), strict=True):
                held += values[~np.isnan(values)].tolist()
            name, hit = group.group.prompt.id, Outcomes.of(group.graded, known.limit).right
            if hit.any() and self._remembers(name, right):
                count, total = right.get(name, (0, [0] * self.size))
                right[name] = [
                    count + int(hit.sum()),
                    (np.array(total) + made[hit].sum(0)).tolist(),
                ]
            if not hit.all() and self._remembers(name, wrong):
                wrong[name] = [*wrong.get(name, []), *made[~hit].tolist()][-self.kept :]
        return {
            "right": right,
            "wrong": wrong,
            "near": near[-self.window :],
            "unlike": unlike[-self.window :],
        }

    def _remembers(self, prompt: str, memory: Mapping[str, object]) -> bool:
        return prompt in memory or len(memory) < self.remembered

    def _parts(
        self, group: Graded, embedded: IntArray, state: State
    ) -> tuple[FloatArray, FloatArray]:
        """Nearness of each response to right ones, and distance from wrong ones, [n]; nan: none."""
        made = embedded.astype(np.float64)
        name = group.group.prompt.id
        near = unlike = np.full(len(made), np.nan)
        if name in state.get("right", {}):
            count, total = state["right"][name]
            near = -np.linalg.norm(made - np.array(total) / count, axis=1)
        if name in state.get("wrong", {}):
            wrong = np.array(state["wrong"][name], dtype=np.float64)
            lengths = np.linalg.norm(made, axis=1)[:, None] * np.linalg.norm(wrong, axis=1)
            unlike = 1.0 - np.max(made @ wrong.T / np.maximum(lengths, 1e-9), axis=1)
        return near, unlike

    def _scaled(self, values: FloatArray, window: Sequence[float]) -> FloatArray:
        if not window or max(window) == min(window):
            return np.zeros(len(values))
        share = (values - min(window)) / (max(window) - min(window))
        return np.nan_to_num(np.clip(share, 0.0, 1.0))

    def _embedded(self, group: Graded) -> IntArray:
        """The embedding of each response, integers [n, size] of norm 1000, so that JSON keeps them
        as they are.
        """
        made = np.zeros((len(group.grades), self.size))
        for row, response in zip(made, group.group.responses, strict=True):
            tokens = np.pad(np.array(response.tokens, dtype=np.int64), (2, 0))
            runs = (tokens[:-2] * 31 + tokens[1:-1]) * 31 + tokens[2:]
            row += np.bincount(runs * 2_654_435_761 % 2**32 % self.size, minlength=self.size)
        return np.rint(1000 * made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.int64)


class Effort(Method):
    """Effort levels: one model that is told how much to think, so that the reader chooses alpha at
    inference.

        r = efr's, with alpha = low, medium or high, each as often, drawn for each visit of a prompt

    The question ends with `suffix`, which says the level; so must the question of a reader
    (`prompt.template`). A wrong or truncated response earns 0. Nothing is remembered: the level is
    a function of the run's seed and the visit. Open: how it compares with a model for each alpha at
    scale; it is this project's own. Chosen: the paper's range of alpha, low effort being its
    largest.
    """

    source = "this project; its reward is Arora & Zanette 2025, arXiv 2502.04463, eq. 4 and 5"

    low: float = Field(default=0.4, ge=0, lt=1, description="alpha of low effort: the briefest")
    medium: float = Field(default=0.1, ge=0, lt=1, description="alpha of medium effort")
    high: float = Field(default=0.0, ge=0, lt=1, description="alpha of high effort")
    suffix: Annotated[str, tells("level")] = Field(
        default=" Effort: {level}.", description="text added to the question"
    )
    words: Annotated[tuple[str, ...], Field(strict=False, min_length=3, max_length=3)] = Field(
        default=LEVELS, description="words for low, medium and high effort in it"
    )

    @model_validator(mode="after")
    def _levels_can_be_told_apart(self) -> Effort:
        if len(set(self.words)) < len(LEVELS):
            raise ValueError(
                f"method.words: {', '.join(self.words)}: each level needs a word of its own"
            )
        return self

    def ask(self, visit: Visit, known: Known) -> Ask:
        return self._asked(LEVELS[int(np.random.default_rng(visit.seed).integers(len(LEVELS)))])

    def longest_asks(self, visit: Visit, known: Known) -> Sequence[Ask]:
        return [self._asked(level) for level in LEVELS]

    def _asked(self, level: str) -> Ask:
        word = self.words[LEVELS.index(level)]
        return Ask(suffix=self.suffix.replace("{level}", word), note={"level": level})

    def rewards(self, group: Graded, known: Known) -> FloatArray:
        seen = Outcomes.of(group, known.limit)
        alpha = {"low": self.low, "medium": self.medium, "high": self.high}[
            group.group.note["level"]
        ]
        return efr_rewards(seen.right, seen.lengths, alpha)
