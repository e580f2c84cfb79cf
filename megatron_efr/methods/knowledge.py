"""What a run knows: its method's state and the history of its prompts, as each iteration may see them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_efr.methods.base import Known, Method, State
from megatron_efr.methods.history import History, dump_history, load_history, visited
from megatron_efr.types import Rewarded


class Knowledge:
    """Keeps what is known between iterations; `limit` is the most tokens of a response.

    An iteration sees what was known when it began (`begin`), however many iterations are under way.
    """

    def __init__(self, method: Method, limit: int) -> None:
        self._method, self._limit = method, limit
        self._state: State = {}
        self._history: History = {}
        self._begun: dict[int, Known] = {}
        self.latest = Known(0, limit, self._state, self._history)  # by which prompts are asked: of the last to begin

    def begin(self, step: int) -> Known:
        """What iteration `step` may know, from now on."""
        self.latest = Known(step, self._limit, copy.deepcopy(dict(self._state)), self._history)
        self._begun[step] = self.latest
        return self.latest

    def of(self, step: int) -> Known:
        """What iteration `step` may know; it has begun."""
        return self._begun[step]

    def learn(self, step: int, groups: Sequence[Rewarded]) -> None:
        """Take in what iteration `step` brought, which is then over."""
        known = self._begun.pop(step)
        self._state = self._method.learn(self._state, groups, known)
        self._history = visited(self._history, [group.graded for group in groups], step)

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, JSON-ready."""
        return {"state": dict(self._state), "history": dump_history(self._history)}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; nothing is known where it is empty."""
        self._state = stored.get("state", {})
        self._history = load_history(stored.get("history", {}))
        self._begun = {}
        self.latest = self.latest._replace(state=self._state, history=self._history)
