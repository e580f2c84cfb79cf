"""The steps of which a response is made, and the parts that they leave in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple


class Penalty(NamedTuple):
    """Takes `amount` from the logits of the tokens `texts` in the first `window` tokens of each
    thought: a thought begins with the response, and with each of these tokens.
    """

    texts: tuple[str, ...]
    amount: float
    window: int


class Draw(NamedTuple):
    """The model goes on: to a stop id, to one of the texts `until`, or to `limit` tokens (None: as
    many as are left).

    A text of `until` is a single token, and the draw ends before it: the next draw begins with that
    token, a `Force` takes its place. One that is several tokens for this model's tokenizer ends no
    draw. `temperature` is the draw's own; None: that of the sampling. With a `penalty` log-probs
    are of what it left: such tokens are not trained on. The script hears the text of a draw that is
    to be `told`.
    """

    part: str
    limit: int | None = None
    until: tuple[str, ...] = ()
    temperature: float | None = None
    penalty: Penalty | None = None
    told: bool = False


class Force(NamedTuple):
    """The script writes `text` in the model's place. It is trained on only if it was chosen with a
    known `chance`.
    """

    part: str
    text: str
    chance: float | None = None


class Fork(NamedTuple):
    """From each of the lengths `at` of the response so far, `samples` branches: `opening` is
    forced, and `limit` tokens (None: as many as are left) are drawn, or fewer, as by `Draw`. The
    response itself stays as it is.

    `ends` end a branch too, each a single token that is drawn as its last, in a part `end` of its
    own. `after` are tokens that stand behind each of `at`, before the opening: such branches are
    the script's alone, are not kept, and with these tokens draw no more than the response may.
    """

    part: str
    at: tuple[int, ...]
    samples: int
    opening: str
    limit: int | None
    until: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    temperature: float | None = None
    after: tuple[tuple[int, ...], ...] = ()


class Take(NamedTuple):
    """The response goes on with tokens that branches have drawn, and their log-probs; `ending` is
    how the last ended.

    They count as drawn: what is more than may be drawn is left out.
    """

    part: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    ending: Literal["stop", "length"]


class Score(NamedTuple):
    """Ask `scorer` how good `texts` are as beginnings of a response to the prompt.

    Servers answer
    others meanwhile; the embedded engine waits.
    """

    texts: tuple[str, ...]
    scorer: Callable[[Any, Sequence[str]], Sequence[float]]


Step = Draw | Force | Fork | Take | Score
Ending = Literal["stop", "until", "length", "forced", "chosen"]


class Part(NamedTuple):
    """Tokens [start, end) of a response, made by one step of a script, whose name it has, and how
    they ended.

    stop, until, length: they were drawn, to a stop id, before a text of `until`, or as far as
    allowed. forced: the script wrote them. chosen: likewise, with a known chance.
    """

    name: str
    start: int
    end: int
    ending: Ending

    @property
    def forced(self) -> bool:
        """True for tokens that the model had no part in: neither counted nor trained on."""
        return self.ending == "forced"
