"""The GPUs of a host that its engines take, by the configuration and torchrun's placement."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_efr.config import ConfigError, RolloutConfig

Gpus = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Host:
    """One machine of the trainer: the `number`-th of `count`, with `ranks` ranks on its first
    GPUs.
    """

    number: int = 0
    count: int = 1
    ranks: int = 1

    @classmethod
    def of_this_process(cls, environment: Mapping[str, str] = os.environ) -> Host:
        """As torchrun says; without it, a machine of one rank. ConfigError if hosts have unequally
        many ranks.
        """
        world = int(environment.get("WORLD_SIZE", "1"))
        ranks = int(environment.get("LOCAL_WORLD_SIZE", world))
        if world % ranks:
            raise ConfigError(
                f"torchrun: {world} ranks, {ranks} of them on this host: start equally many on "
                "each host (--nproc-per-node)"
            )
        return cls(int(environment.get("RANK", "0")) // ranks, world // ranks, ranks)

    def engine_gpus(self, rollout: RolloutConfig) -> list[Gpus]:
        """The GPUs of each engine that this host starts; ConfigError if they do not divide."""
        if rollout.embedded or rollout.urls:
            return []
        if rollout.placement == "colocated":
            return self._colocated(rollout)
        engines, rest = divmod(rollout.engines or 1, self.count)
        if rest:
            raise ConfigError(
                f"rollout.engines: {rollout.engines} do not divide over {self.count} hosts; make "
                f"them a multiple of {self.count}, or give engines elsewhere in rollout.urls"
            )
        return neighbours(range(self.ranks, self.ranks + engines * rollout.tp), rollout.tp)

    def _colocated(self, rollout: RolloutConfig) -> list[Gpus]:
        if self.ranks % rollout.tp:
            fitting = [n for n in range(1, self.ranks + 1) if self.ranks % n == 0]
            raise ConfigError(
                f"rollout.tp: {rollout.tp} does not divide the {self.ranks} ranks of a host; one "
                f"of {fitting} would"
            )
        engines = self.count * self.ranks // rollout.tp
        if rollout.engines not in (None, engines):
            raise ConfigError(
                f"rollout.engines: {rollout.engines}, and colocated there is one for every "
                f"rollout.tp = {rollout.tp} of {self.count * self.ranks} ranks: {engines}; leave "
                "it out"
            )
        return neighbours(range(self.ranks), rollout.tp)


def neighbours(gpus: Sequence[int], tp: int) -> list[Gpus]:
    """`gpus` in order, `tp` at a time."""
    return [tuple(gpus[start : start + tp]) for start in range(0, len(gpus), tp)]
