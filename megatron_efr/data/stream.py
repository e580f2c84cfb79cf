"""The endless, seeded stream of training prompts: a fresh permutation each epoch, resumable at the
exact prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_efr.types import Prompt, UserError


class StreamError(UserError, ValueError):
    """A stream that cannot be built or resumed."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One drawing of a prompt; `index` counts all drawings of the run from 0, so request seeds can
    follow from it.
    """

    index: int
    prompt: Prompt


class PromptStream:
    """Draws prompts epoch by epoch; what visit i gives is a function of (prompts, seed, shuffle, i)
    alone.

    The state is therefore one number, and resuming needs no replay.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise StreamError("a prompt stream needs at least one prompt")
        self._prompts = list(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._next = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._checksum = _checksum(self._prompts)

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self._prompts)

    @property
    def next_index(self) -> int:
        """The index of the next visit: how many prompts were drawn so far."""
        return self._next

    @property
    def epoch(self) -> float:
        """Epochs drawn so far, with their fraction."""
        return self._next / len(self._prompts)

    def take(self, count: int) -> list[Visit]:
        """The next `count` visits, going on into the following epochs if one runs out."""
        visits = [self.visit(index) for index in range(self._next, self._next + count)]
        self._next += count
        return visits

    def visit(self, index: int) -> Visit:
        """Visit `index`, past or future; the stream does not move."""
        return Visit(index, self.at(index))

    def at(self, index: int) -> Prompt:
        """The prompt of visit `index`, past or future; the stream does not move."""
        epoch, position = divmod(index, len(self._prompts))
        if not self._shuffle:
            return self._prompts[position]
        if self._order[0] != epoch:
            generator = np.random.Generator(
                np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
            )
            self._order = (epoch, generator.permutation(len(self._prompts)))
        return self._prompts[int(self._order[1][position])]

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint keeps: plain numbers and strings."""
        return {
            "next_index": self._next,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "prompts": len(self._prompts),
            "checksum": self._checksum,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` stopped; StreamError when it belongs to other prompts, or to another
        seed or order.
        """
        mine = self.state_dict()
        for key in ("prompts", "checksum", "seed", "shuffle"):
            if state.get(key) != mine[key]:
                raise StreamError(
                    f"the saved prompt stream is not this one: {key} was {state.get(key)!r} and "
                    f"is now {mine[key]!r}; resume with the data, prompt template, tokenizer and "
                    "seed of the saved run, or start a new run"
                )
        self._next = int(state["next_index"])


def _checksum(prompts: list[Prompt]) -> str:
    """SHA-256 over ids, gold answers and token ids; StreamError when two prompts share an id."""
    digest = hashlib.sha256()
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise StreamError(
                f"two prompts have the id {prompt.id!r}; give each data set its own `name`"
            )
        seen.add(prompt.id)
        digest.update(repr((prompt.id, prompt.gold, prompt.tokens)).encode())
    return digest.hexdigest()
