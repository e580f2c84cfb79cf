"""Modes of thinking that an evaluation asks for: none, little, or a summary in the place of the
thought.

The modes are those of "Trade-offs in Large Reasoning Models" (arXiv 2503.17979), known here by its
abstract; the words and the way a summary is made are this project's. The chat template has opened
the thought; if it has not, an opening must begin with `<think>\\n`. A model that ends a thought
with another text than `</think>` needs it in the options.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveInt

from megatron_efr.config import ConfigError
from megatron_efr.scripts.kinds import Kind, Opened, Steps, Token
from megatron_efr.steps import Draw, Force, Fork, Take
from megatron_efr.types import Done


class ZeroThinking(Opened):
    """An empty thought, and the answer at once."""

    opening: Token = "\n</think>\n\n"


class LessThinking(Opened):
    """A thought that says no more than that little of one is needed, and the answer at once."""

    opening: Token = "This can be answered without thinking much.\n</think>\n\n"


class SummaryThinking(Kind):
    """A thought that is made beforehand, and in its place a summary of it by the model, behind
    which it answers.

    The thought, of at most `most` tokens (what max_new_tokens leaves beside the summary), is drawn
    apart, and `wish` and at most `tokens` tokens behind it. The response is that summary, `cut`,
    and an answer that sees no more than this. Its length is its own: what was drawn apart is in no
    figure, so that tokens say what a reader gets, and not what it cost. A response that ends
    without a thought is taken as it is. It is for evaluations.
    """

    most: PositiveInt | None = None
    tokens: PositiveInt = Field(default=512, description="tokens of the summary at most")
    end: Token = Field(default="</think>", description="text that ends the thought: a single token")
    wish: Token = "\n\nIn short, what matters of this reasoning:\n"
    cut: Token = "\n</think>\n\n"

    @property
    def until(self) -> tuple[str, ...]:
        return (self.end,)

    @property
    def forced(self) -> tuple[str, ...]:
        return (self.cut,)

    @property
    def branches(self) -> tuple[str, int] | None:
        return self.wish, 0  # what is drawn apart is no longer than the response may be

    @property
    def trainable(self) -> bool:
        return False

    def within(self, limit: int) -> Self:
        return self if self.most else self.model_copy(update={"most": limit - self.tokens})

    def check(self, limit: int, path: str) -> None:
        most = limit - self.tokens if self.most is None else self.most
        if not 0 < most <= limit - self.tokens:
            raise ConfigError(
                f"{path}.tokens: a summary of {self.tokens} tokens behind a thought of "
                f"{max(most, 1)} does not fit into max_new_tokens = {limit}; lower it, or raise "
                "max_new_tokens"
            )

    def steps(self, sample: int) -> Steps:
        done = yield Fork("thought", (0,), 1, "", self.most, (self.end,), after=((),))
        thought, logprobs, ending = _drawn(done)
        if ending == "stop":
            yield Take("response", thought, logprobs, "stop")
            return
        done = yield Fork("summary", (0,), 1, self.wish, self.tokens, (self.end,), after=(thought,))
        summary, logprobs, ending = _drawn(done)
        kept = len(summary) - (ending == "stop")  # the answer is still to come
        yield Take("summary", summary[:kept], logprobs[:kept], "length")
        yield Force("cut", self.cut)
        yield Draw("answer")


def _drawn(done: Done) -> tuple[tuple[int, ...], tuple[float, ...], str]:
    """Tokens and log-probs that a fork's one branch drew behind its opening, and how it ended."""
    response = done.branches[0].responses[0]
    part = response.parts[-1]
    logprobs = tuple(float(each) for each in response.logprobs[part.start : part.end])
    return response.tokens[part.start : part.end], logprobs, part.ending
