"""Published decode-time rules that try what the model would answer in the middle of its thought.

`</think>` stands for the text that ends a thought; a model that has another is told so by the
option `end`.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_efr.scripts.kinds import EarlyExit, Kind, Steps, Texts, Token, check_answered
from megatron_efr.steps import Draw, Force, Fork
from megatron_efr.types import Branch

CLOSING = (" }", "}\n", "}\n\n", "}.", "}.\n", "}\\", "}}", ")}", ")}.", ")}\n")
"""The texts that end a trial answer in a box."""

MARKERS = (
    *(
        "Wait",
        "Alternatively",
        "Hmm",
        "Maybe",
        "Okay",
        "Alright",
        "But wait",
        "Hold on",
        "Another angle",
    ),
    *(
        "Another approach",
        "Looking back",
        "Let me",
        "Let's see",
        "Let me double-check",
        "I think",
        "First",
        "Then",
    ),
    *(
        "So",
        "Now",
        "Therefore",
        "Thus",
        "Compute",
        "Correct",
        "Good",
        "Got it",
        "Remember",
        "Similarly",
        "Starting",
    ),
    *("Seems solid", "That's correct", "That seems right", "I don't see any errors"),
)
"""The 32 texts that begin a subthought."""

DEER: dict[str, dict[str, Any]] = {
    "vllm": {},
    "transformers": {
        "probe": "\n**Final Answer**\n\nThe final answer is \\boxed",
        "probe_end": ("}", " }", "}.", "}.\n", "}\\", "}}", ")}", ")}.", ")}\n", "</think>"),
        "tokens": 21,
        "temperature": 0.0,
        "skip_last": 1,
        "tries": None,
        "share": 0.9,
        "near": 100,
        "leaves": ("**",),
    },
    "qwen3": {"probe_end": ("</think>",), "mean": "geometric", "closed": True, "share": 0.8},
}
"""Options of DEER's forms that differ from the first form's."""


class Deer(Kind):
    """A thought that is left once the model is sure of a trial answer (DEER, arXiv 2504.15895).

    Before each of `pauses`, `probe` and up to `tokens` tokens are tried beside the response, at a
    `temperature` of their own; the one of `probe_end` that ends them is among them. Their
    confidence is the mean of their probabilities, without the first `skip` and the last
    `skip_last`. If it is above `sure`, or the thought is within `near` tokens of its limit, `exit`
    takes the pause's place, as it takes that of the thought's own end. The limit is `most` tokens,
    or `share` of max_new_tokens.

    The repository (iie-ycx/DEER@c9dd19f) has three `form`s: `vllm` samples the trial answer;
    `transformers` takes the most probable tokens, another probe, neither first nor last token,
    every pause, and leaves the thought at `**`; `qwen3` takes the geometric mean, and wants
    `</think>` after the trial answer. Texts of `probe_end` that are no single tokens of the
    tokenizer end nothing. A stop token within the thought ends the response; the source goes on.
    """

    form: Literal["vllm", "transformers", "qwen3"] = "vllm"
    pauses: Texts = Field(
        default=("Wait",), min_length=1, description="texts that pause a thought: single tokens"
    )
    leaves: Texts = Field(
        default=(), description="single tokens at which the thought is left as at its end"
    )
    probe: Token = "\n**Final Answer**\n\\boxed"
    probe_end: Texts = CLOSING
    tokens: PositiveInt = 20
    temperature: float = Field(
        default=1.0,
        ge=0,
        description="temperature of the trial answer; 0 takes the most probable tokens",
    )
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    skip: int = Field(default=1, ge=0)
    skip_last: int = Field(default=0, ge=0)
    closed: bool = Field(
        default=False, description="a trial answer counts only if one of `probe_end` ended it"
    )
    sure: float = Field(default=0.95, gt=0, le=1)
    tries: PositiveInt | None = Field(
        default=10, description="pauses that are probed; later ones are passed"
    )
    most: PositiveInt | None = None
    share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    near: int = Field(default=50, ge=0)
    end: Token = Field(default="</think>", description="text that ends the thought: a single token")
    exit: Token = "\n</think>\n\n"

    @model_validator(mode="before")
    @classmethod
    def _as_the_form_has_it(cls, tree: Any) -> Any:
        form = tree.get("form", "vllm") if isinstance(tree, dict) else None
        return {**DEER[form], **tree} if isinstance(form, str) and form in DEER else tree

    @property
    def until(self) -> tuple[str, ...]:
        return (*self.pauses, *self.leaves, self.end)

    @property
    def forced(self) -> tuple[str, ...]:
        return (self.exit,)

    @property
    def branches(self) -> tuple[str, int]:
        return self.probe, self.tokens

    def within(self, limit: int) -> Self:
        return (
            self if self.most else self.model_copy(update={"most": max(1, int(limit * self.share))})
        )

    def check(self, limit: int, path: str) -> None:
        check_answered(self.most, limit, path)

    def confidence(self, branch: Branch) -> float:
        """The mean probability of a trial answer's tokens that count; 0 without any."""
        response = branch.responses[0]
        if self.closed and response.parts[-1].name != "end":
            return 0.0
        drawn = response.logprobs[response.trained].astype(np.float64)
        drawn = drawn[self.skip : len(drawn) - self.skip_last]
        if not len(drawn):
            return 0.0
        return math.exp(drawn.mean()) if self.mean == "geometric" else float(np.exp(drawn).mean())

    def steps(self, sample: int) -> Steps:
        tries, thought = 0, 0
        while True:
            # once the tries are spent, pauses are drawn like any other token
            pauses = self.pauses if self.tries is None or tries < self.tries else ()
            left = None if self.most is None else max(0, self.most - thought)
            done = yield Draw("thought", left, (*pauses, *self.leaves, self.end))
            # the model ended by itself, or left the thought by itself
            if done.part.ending == "stop":
                return
            thought = done.part.end
            tries = tries + 1
            if done.part.ending == "length" or done.met not in self.pauses:
                break
            # too near the limit for another thought
            if self.most is not None and thought >= self.most - self.near:
                break
            # a trial answer beside the response, which does not see it
            fork = Fork(
                "probe",
                (thought,),
                1,
                self.probe,
                self.tokens,
                (),
                self.probe_end,
                self.temperature,
            )
            if self.confidence((yield fork).branches[0]) > self.sure:
                break
        # however it was left, the thought is closed by the same text
        yield Force("exit", self.exit)
        yield Draw("answer")


UNSURE = ("wait", "hold", "but", "okay", "no", "hmm")


class EarlyStop(Kind):
    """A thought that ends as soon as the model gives one answer several times in a row (arXiv
    2412.20993).

    Every `every` tokens, `probe` and up to `tokens` tokens are tried beside the response. If the
    last `agree` probes name the same answer in their box, and none of their texts holds a word of
    `unsure`, `exit` is written, and the model goes on from there: with the answer, as it has given
    it before.

    Source: hao-ai-lab/Dynasor@0d2f1b9 core/cot.py, whose efforts (agree, every) are mild (8, 64),
    low (5, 64), mid (3, 64), high (2, 64) and crazy (2, 32). It writes the answer itself, counts
    equal values as the same, and probes `every` tokens earlier, from the very start, and with top-p
    0.95.
    """

    every: PositiveInt = 64
    agree: PositiveInt = 3
    probe: Token = (
        "... Oh, I suddenly got the answer to the whole problem, **Final Answer**\n\n\\[ \\boxed{"
    )
    tokens: PositiveInt = 20
    temperature: float | None = Field(
        default=0.6, ge=0, description="temperature of the probes; none: the evaluation's"
    )
    unsure: Texts = UNSURE
    end: Token = Field(default="</think>", description="text that ends the thought: a single token")
    exit: Token = (
        "\n\n...</think>\n Oh, I have got the answer to the whole problem\n**Final "
        "Answer:**\n\\[\n \\boxed{"
    )

    @property
    def until(self) -> tuple[str, ...]:
        return (self.end,)

    @property
    def forced(self) -> tuple[str, ...]:
        return (self.exit,)

    @property
    def branches(self) -> tuple[str, int]:
        return self.probe, self.tokens

    def steps(self, sample: int) -> Steps:
        answers: deque[str] = deque(maxlen=self.agree)
        while True:
            done = yield Draw("thought", self.every, self.until)
            # also right behind a probe, as the first token of its draw
            if done.part.ending == "until":
                break
            if done.part.ending == "stop" or done.part.start == done.part.end:
                return
            fork = Fork(
                "probe", (done.part.end,), 1, self.probe, self.tokens, temperature=self.temperature
            )
            answers.append(self.answer((yield fork).branches[0].responses[0].text))
            if len(answers) == self.agree and answers[0] and len(set(answers)) == 1:
                yield Force("exit", self.exit)
                break
        yield Draw("answer")

    def answer(self, probed: str) -> str:
        """The answer in a probe's box; empty for a box that does not close, or a word of doubt."""
        said = probed.removeprefix(self.probe)
        if any(word in said.lower() for word in self.unsure):
            return ""
        open_braces = 0
        for place, letter in enumerate(said):
            open_braces += (letter == "{") - (letter == "}")
            if open_braces < 0:
                return said[:place].strip()
        return ""


class Subthoughts(Kind):
    """A whole response, and answers from each subthought's beginning (arXiv 2504.20708, 3.2-3.5).

    A subthought begins with one of `markers`, as far as these are single tokens. From each of these
    places, at most `most` of them, `samples` branches go on to their end, of `tokens` tokens at
    most. The source draws the response greedily, branches greedily or at temperature 1 and top-p
    0.95, and answers with the mode of the branches' answers, the earliest of equals.
    """

    markers: Texts = Field(default=MARKERS, min_length=1)
    samples: PositiveInt = 1
    tokens: PositiveInt = Field(default=8192, description="tokens of a branch at most")
    temperature: float | None = Field(
        default=None, ge=0, description="temperature of the branches; none: the evaluation's"
    )
    most: PositiveInt | None = Field(default=None, description="places, spread evenly; none: all")
    end: Token = Field(default="</think>", description="text that ends the thought: a single token")

    @property
    def until(self) -> tuple[str, ...]:
        return (self.end,)

    @property
    def until_any(self) -> tuple[str, ...]:
        return self.markers

    @property
    def branches(self) -> tuple[str, int]:
        return "", self.tokens

    def steps(self, sample: int) -> Steps:
        places: list[int] = []
        while True:
            done = yield Draw("thought", None, (*self.markers, self.end))
            if done.part.ending != "until" or done.met == self.end:
                break
            places.append(done.part.end)
        if done.part.ending == "until":
            yield Draw("answer")
        if self.most is not None and len(places) > self.most:
            places = [places[i * len(places) // self.most] for i in range(self.most)]
        if places:
            yield Fork(
                "subthought",
                tuple(places),
                self.samples,
                "",
                self.tokens,
                temperature=self.temperature,
            )


class Concise(EarlyExit):
    """Short thoughts to learn from: doubts give way to words of confidence, and the thought ends
    once it is sure.

    Before each of `pauses`, `probe` is tried as `early_exit` does. If the model is sure of its
    answer, `exit` takes the pause's place; if not, one of `phrases` does, in turn. After ConCISE
    (arXiv 2505.04881), of which only the abstract and summaries were read: that it injects phrases
    of confidence in place of doubt, stops early on a probe, and learns from what is right. Phrases,
    probe and threshold are ours.
    """

    pauses: Texts = Field(
        default=("Wait", "Alternatively", "Hmm"),
        min_length=1,
        description="texts that pause a thought: single tokens",
    )
    phrases: Annotated[tuple[Token, ...], Field(strict=False)] = Field(
        default=("This step is right. ", "I am confident in this. ", "That is clear. "),
        min_length=1,
    )

    @property
    def forced(self) -> tuple[str, ...]:
        each = -(-self.tries // len(self.phrases))  # they take turns
        return (self.exit, *self.phrases * each)

    def unsure(self, sample: int, number: int) -> str:
        return self.phrases[(sample + number) % len(self.phrases)]
