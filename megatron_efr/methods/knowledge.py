"""A run's knowledge: its method's state and its prompts' history, as each iteration sees them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_efr.methods.base import Known, Method, State
from megatron_efr.methods.history import History, dump_history, load_history, visited
from megatron_efr.methods.samplings import NONE, ByPrompt, dump, load
from megatron_efr.types import Marks, Rewarded


class Knowledge:
    """Keeps what is known between iterations; `limit` is the most tokens of a response, `marks`
    stand around a thought.

    An iteration sees what was known when it began (`begin`), however many iterations are under way.
    """

    def __init__(self, method: Method, limit: int, marks: Marks | None = None) -> None:
        self._method = method
        self._state: State = {}
        self._history: History = {}
        self._begun: dict[int, Known] = {}
        self._monitored: int | None = None
        # by which prompts are asked: of the last iteration to begin
        self.latest = Known(0, limit, self._state, self._history, marks=marks)
        self.reference: ByPrompt = NONE  # of the starting model: the run folder keeps it
        self._monitor: ByPrompt = NONE

    def begin(self, step: int) -> Known:
        """Begin iteration `step`: its knowledge is that of now."""
        self.latest = self.latest._replace(
            step=step,
            state=copy.deepcopy(dict(self._state)),
            history=self._history,
            reference=self.reference,
            monitor=self._monitor,
            monitored=self._monitored,
        )
        self._begun[step] = self.latest
        return self.latest

    def of(self, step: int) -> Known:
        """Knowledge of iteration `step`, which has begun; KeyError if it has not."""
        return self._begun[step]

    def learn(self, step: int, groups: Sequence[Rewarded]) -> None:
        """Take in what iteration `step` brought, which is then over."""
        known = self._begun.pop(step)
        self._state = self._method.learn(self._state, groups, known)
        self._history = visited(self._history, [group.graded for group in groups], step)

    def figures(self) -> dict[str, float]:
        """The numbers of the method's state, as an iteration's metrics have them: a controller's
        price, for one.
        """
        numbers = {
            name: value for name, value in self._state.items() if isinstance(value, (int, float))
        }
        return {f"method/{name}": float(value) for name, value in numbers.items()}

    @property
    def monitored(self) -> int | None:
        """Iterations that were over when the monitor set was last sampled; None: it was not."""
        return self._monitored

    def monitor(self, step: int, sampled: ByPrompt) -> None:
        """Take in what the monitor set answered after iteration `step`."""
        self._monitored, self._monitor = step, sampled

    def state_dict(self) -> dict[str, Any]:
        """State that must survive a restart, JSON-ready."""
        kept: dict[str, Any] = {"state": dict(self._state), "history": dump_history(self._history)}
        if self._monitored is not None:
            kept["monitor"] = {"step": self._monitored, "sampled": dump(self._monitor)}
        return kept

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; nothing is known if it is empty."""
        self._state = stored.get("state", {})
        self._history = load_history(stored.get("history", {}))
        self._begun = {}
        monitor = stored.get("monitor", {"step": None, "sampled": {}})
        self._monitored = monitor["step"]
        self._monitor = load(monitor["sampled"])
        self.latest = self.latest._replace(
            state=self._state,
            history=self._history,
            monitor=self._monitor,
            monitored=self._monitored,
        )
