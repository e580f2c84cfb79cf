"""The initial model, which a KL refers to: its weights kept in host memory, or the trained adapters
turned off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_efr.policy.parameters import Parameters


class Reference:
    """Lets the initial model stand in for the current one. Adapters cost no second copy of the
    weights.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._waiting = None if parameters.adapted else parameters.copies()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the modules compute what the initial model does; weights that were trained wait
        in host memory.
        """
        if self._waiting is None:
            with self._parameters.adapters_off():
                yield
            return
        self._waiting = self._parameters.exchange(self._waiting)
        try:
            yield
        finally:
            self._waiting = self._parameters.exchange(self._waiting)
