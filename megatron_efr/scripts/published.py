"""Published decode-time rules, each as its source has it: the defaults are the source's, and so are
the names.

`</think>` stands for the text that ends a thought; a model that has another is told so by the
option `end`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt

from megatron_efr.config import ConfigError
from megatron_efr.scripts.kinds import (
    Budget,
    Kind,
    Opened,
    Plain,
    Steps,
    Texts,
    Token,
    check_answered,
)
from megatron_efr.steps import Draw, Force, Penalty


class CutOff(Kind):
    """Generation that is cut off at `most` tokens, wherever it stands: the baseline of arXiv
    2502.04463.

    A response that is cut is wrong, as one that reaches max_new_tokens is.
    """

    most: PositiveInt

    def steps(self, sample: int) -> Steps:
        yield Draw("response", self.most)


class NoThinking(Opened):
    """A thought that is over when it begins, and the answer at once (arXiv 2504.09858).

    The chat template has opened the thought; if it has not, `opening` must begin with `<think>\\n`.
    """

    opening: Token = "Okay, I think I have finished thinking.\n</think>\n\n"


class Elastic(Budget):
    """A thought of at most `most` tokens, t, and an answer of at most `answer`, s.

    A thought that is longer is ended by `cut`, the bare end of a thought. Source: arXiv 2505.05315;
    SalesforceAIResearch/Elastic-Reasoning@8871a3c vllm_rollout.py.
    """

    most: PositiveInt = 1024
    answer: PositiveInt | None = 1024
    cut: Token = "</think>"


class S1(Kind):
    """Budget forcing at both ends (arXiv 2501.19393; simplescaling/s1@77272c6 vllm_causallms.py).

    The end of a thought is replaced by `wait`, `waits` times, whatever its length. A thought of
    `most` tokens in all is ended by `header` and `final`, on a new line; one that ends before by
    `header` alone. Without `most`, `leave` tokens of max_new_tokens are left for the answer. s1's
    own models have `end: "<|im_start|>"` and `header: "<|im_start|>answer\\n"`. The source also
    forbids that an end comes directly after `wait`. A stop token within the thought ends the
    response; the source goes on.
    """

    most: PositiveInt | None = None
    leave: PositiveInt = Field(
        default=100, description="tokens for the answer, if `most` is not given"
    )
    answer: PositiveInt | None = None
    end: Token = Field(default="</think>", description="text that ends the thought: a single token")
    header: Token = "</think>\n\n"
    final: Token = "Final Answer:"
    wait: Token = "Wait"
    waits: int = Field(
        default=2, ge=0, description="how often the thought goes on; the source tries 1, 2, 4 and 6"
    )

    @property
    def until(self) -> tuple[str, ...]:
        return (self.end,)

    @property
    def forced(self) -> tuple[str, ...]:
        return (f"\n{self.header}{self.final}", *[self.wait] * self.waits)

    def within(self, limit: int) -> Self:
        return self if self.most else self.model_copy(update={"most": limit - self.leave})

    def check(self, limit: int, path: str) -> None:
        if self.most is not None and self.most < 1:
            raise ConfigError(
                f"{path}.leave: {self.leave} tokens for the answer leave none of max_new_tokens = "
                f"{limit} for a thought; lower it, or raise max_new_tokens"
            )
        check_answered(self.most, limit, path)

    def steps(self, sample: int) -> Steps:
        left, waits = self.most, self.waits
        while True:
            done = yield Draw("thought", left, self.until, told=True)
            left = None if left is None else left - (done.part.end - done.part.start)
            if done.part.ending != "until" or left == 0 or not waits:
                break
            waits -= 1
            yield Force("wait", self.wait)
        if done.part.ending == "stop":
            return
        if done.part.ending == "until":
            yield Force("header", self.header)
        else:
            yield Force(
                "header", ("" if done.text.endswith("\n") else "\n") + self.header + self.final
            )
        yield Draw("answer", self.answer)


class Tip(Kind):
    """A penalty on switching thoughts (TIP, arXiv 2501.18585, eq. 2), for evaluations alone.

    While a thought has fewer than `window` tokens, the logits of the tokens `switch` are lower by
    `amount`. A thought begins with the response, and with each of these tokens. The source tunes
    both on AIME 2022 and 2023, over 3 to 30 and 300 to 700, and names "alternatively" as an example
    of its tokens.
    """

    switch: Texts = Field(
        default=("Alternatively",),
        min_length=1,
        description="texts that switch the thought: single tokens",
    )
    amount: float = Field(default=3.0, gt=0)
    window: PositiveInt = Field(default=600, description="tokens")

    @property
    def penalised(self) -> tuple[str, ...]:
        return self.switch

    def steps(self, sample: int) -> Steps:
        yield Draw("response", penalty=Penalty(self.switch, self.amount, self.window))


class Told(Plain):
    """A question with a wish behind it, as to how to think; the response is drawn at once."""

    suffix: Token = Field(description="text added to the question")

    @property
    def behind(self) -> str:
        return self.suffix


class ThinkFor(Plain):
    """A question with a number of tokens behind it, as models of L1 are trained to obey (arXiv
    2503.04697).
    """

    tokens: PositiveInt
    suffix: Annotated[str, Field(pattern=r"\{tokens\}")] = "\n\nThink for {tokens} tokens."

    @property
    def behind(self) -> str:
        return self.suffix.replace("{tokens}", str(self.tokens))


SKETCHES = {
    "chunked_symbolism": (
        "Write each step as an equation of named quantities with their units, without sentences."
    ),
    "conceptual_chaining": (
        "Write each step as a chain of the few key concepts, joined by arrows, without sentences."
    ),
    "expert_lexicons": (
        "Write each step in the field's own symbols and abbreviations, without sentences."
    ),
}


class Sketch(Plain):
    """A question with the wish to think in sketches, after Sketch-of-Thought (arXiv 2503.05179).

    The three paradigms are the source's; the words are ours. The source (SimonAytes/SoT@94c6b8d)
    has a system prompt and examples for each, and a classifier that chooses one by the question.
    """

    paradigm: Literal["chunked_symbolism", "conceptual_chaining", "expert_lexicons"] = (
        "chunked_symbolism"
    )

    @property
    def behind(self) -> str:
        return f"\n\nThink in a sketch. {SKETCHES[self.paradigm]} Then give the answer."
