"""Responses in rounds: each begins anew behind the prompt, with what the one before has told."""

from __future__ import annotations

from pydantic import Field, PositiveInt, model_validator

from megatron_efr.config import ConfigError
from megatron_efr.scripts.kinds import Kind, Steps, Token
from megatron_efr.steps import Draw, Fork


class Rounds(Kind):
    """A first round, and further ones as long as a round ends with a summary, at most `most`
    together.

    A round that holds a text between `opens` and `closes` is followed by a branch from the very
    beginning, which opens with `history` around that text: the model sees the prompt and the
    summary, and nothing else of what it said before. One without, with an empty one, or with one
    that is cut, is the last (InftyThink, arXiv 2503.06692; its code begins anew if one is cut,
    without a summary).
    """

    tokens: PositiveInt = Field(description="tokens of a round at most")
    most: PositiveInt = 50
    opens: Token = "<summary>"
    closes: Token = "</summary>"
    history: Token = Field(
        default="<history>\n{summary}\n</history>", description="around {summary}"
    )

    @model_validator(mode="after")
    def _history_holds_a_summary_and_no_mark(self) -> Rounds:
        if "{summary}" not in self.history:
            raise ValueError(
                f"history: {self.history!r} tells no round of the one before; put {{summary}} "
                "where it is"
            )
        if self.opens in self.history:
            raise ValueError(
                f"history: {self.history!r} holds {self.opens!r}, and each round would have a "
                "summary"
            )
        return self

    @property
    def branches(self) -> tuple[str, int] | None:
        """A summary has as many tokens as a round, at most."""
        return (self.history.replace("{summary}", ""), 2 * self.tokens) if self.most > 1 else None

    def check(self, limit: int, path: str) -> None:
        raise ConfigError(
            f"{path}.name: rounds are for training: an evaluation would judge the first round alone"
        )

    def steps(self, sample: int) -> Steps:
        done = yield Draw("round", self.tokens, told=True)
        summary = self.summary(done.text)
        for _ in range(self.most - 1):
            if not summary:
                return
            done = yield Fork(
                "round", (0,), 1, self.history.replace("{summary}", summary), self.tokens
            )
            summary = self.summary(done.branches[0].responses[0].text)

    def summary(self, text: str) -> str:
        """Text behind the last `opens` if it is closed, else nothing: it may have been cut."""
        _, opened, behind = text.rpartition(self.opens)
        summary, closed, _ = behind.partition(self.closes)
        return summary.strip() if opened and closed else ""
