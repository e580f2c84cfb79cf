"""Metrics, progress and peak memory of a run, and a watchdog for one that is stuck."""

from megatron_efr.observe.observer import (
    EXIT_STUCK as EXIT_STUCK,
)
from megatron_efr.observe.observer import (
    Observer as Observer,
)
from megatron_efr.observe.observer import (
    Watchdog as Watchdog,
)
from megatron_efr.observe.observer import (
    deterministic as deterministic,
)
