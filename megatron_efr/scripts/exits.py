"""Responses that are tried elsewhere: their thought is left early, beside them, and answered."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from megatron_efr.scripts.kinds import Answered, Steps
from megatron_efr.steps import Draw, Fork

Share = Annotated[float, Field(gt=0, lt=1)]


class Exits(Answered):
    """A whole response, and answers from within its thought: at shares of its length, or wherever
    chance has it.

    Sources: S-GRPO's serial group (arXiv 2505.07686), JET's truncation (arXiv 2509.23392).
    `opening` ends the thought of a branch. A thought of n tokens has `drawn` exits (or n - 1, if
    these are fewer) after 1 to n - 1 of them, each equally likely: a function of `seed` and the
    sample. Or one at each of `shares` of it, rounded down.
    """

    shares: Annotated[tuple[Share, ...], Field(strict=False)] = Field(
        default=(), description="shares of the thought after which it is left"
    )
    drawn: int = Field(
        default=0, ge=0, description="exits that are drawn at random, instead of shares"
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_of_both(self) -> Exits:
        if bool(self.shares) == bool(self.drawn):
            raise ValueError(
                "shares: give either shares of the thought, or how many exits are drawn, and not "
                "both"
            )
        return self

    def steps(self, sample: int) -> Steps:
        done = yield Draw("thought" if self.end else "response", None, self.until)
        if done.part.ending == "until":
            yield Draw("answer")
        if at := self._exits(done.part.end, sample):
            yield Fork("exit", at, self.samples, self.opening, self.tokens)

    def _exits(self, thought: int, sample: int) -> tuple[int, ...]:
        """The lengths of a thought of so many tokens at which it is left, ascending."""
        if thought < 2:
            return ()
        if self.shares:
            return tuple(sorted({max(1, int(share * thought)) for share in self.shares}))
        chance = np.random.default_rng([self.seed, sample])
        drawn = chance.choice(thought - 1, min(self.drawn, thought - 1), replace=False)
        return tuple(sorted((drawn + 1).tolist()))
