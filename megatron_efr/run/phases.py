"""Engines and trainer on the same GPUs: who has the memory when, as one state machine that every
rank steps alike.

    to_policy:   release: pause, keep unfinished responses, give up caches and weights
        restore: optimizer, gradients
    to_engines:  offload: gradients, optimizer    wake: weights' memory    publish
        resume: caches, then go on

If they share nothing (`rollout.placement: apart`) each keeps what it has: `to_engines` publishes,
and that is all.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from megatron_efr.types import UserError

FREED = 0.9
"""Share of the engines' weights by which free memory must have grown when they have released it;
caches come on top.
"""

WAIT_S, WAITS = 0.1, 100
"""SGLang answers when one of an engine's ranks has released its memory; the others may take a
moment longer.
"""

Timer = Callable[[str], AbstractContextManager[None]]
"""Measures a phase that it is given the name of."""


class Sleeper(Protocol):
    """An engine, as far as its memory is concerned: see `rollout.engine.Engine`."""

    def sleep(self) -> int: ...

    def wake(self) -> None: ...

    def resume(self) -> None: ...


class Trained(Protocol):
    """A policy, as far as its memory is concerned."""

    def offload_training_state(self) -> None: ...

    def restore_training_state(self) -> None: ...


class Publisher(Protocol):
    """Brings weights to the engines; all ranks together."""

    def publish(self, weights: Any, version: int) -> None: ...


class Restarts(Protocol):
    """Servers that are started again if they end, which takes memory."""

    def hold(self) -> None: ...

    def allow(self) -> None: ...


class World(Protocol):
    """The part of the ranks that the phases need."""

    def share(self, make: Callable[[], int], what: str) -> int: ...

    def on_main(self, make: Callable[[], None], what: str) -> Any: ...

    def total(self, number: int) -> int: ...

    def barrier(self) -> None: ...


class State(enum.Enum):
    """State of the devices' memory: its owner, and the step that comes next."""

    SERVING = "the engines serve, and gradients and optimizer are in host memory; release is next"
    RELEASED = "the engines sleep, and gradients and optimizer are in host memory; restore is next"
    TRAINING = "the engines sleep, and gradients and optimizer are on the device; offload is next"
    OFFLOADED = (
        "the engines sleep, and gradients and optimizer are in host memory again; wake is next"
    )
    AWAKE = "the engines are paused and have room for weights, but no weights; publish is next"
    PUBLISHED = "the engines are paused and have weights, but no caches; resume is next"


STEPS = {
    "release": (State.SERVING, State.RELEASED),
    "restore": (State.RELEASED, State.TRAINING),
    "offload": (State.TRAINING, State.OFFLOADED),
    "wake": (State.OFFLOADED, State.AWAKE),
    "publish": (State.AWAKE, State.PUBLISHED),
    "resume": (State.PUBLISHED, State.SERVING),
}
"""Each step, the state that it begins in and the one that it ends in. A step that fails leaves the
state as it was.
"""


class Phases:
    """The memory of the devices, handed from the engines to the policy and back. `engine` is rank
    0's.

    If it is `shared`, engines sleep from here on: the policy is built next, and `to_engines` makes
    them serve. `engine_bytes` are the weights of one engine, 0 if there is no GPU to check that
    they are released.
    """

    def __init__(
        self,
        publisher: Publisher,
        engine: Sleeper | None,
        restarts: Restarts,
        ranks: World,
        *,
        shared: bool,
        engine_bytes: int = 0,
    ) -> None:
        self._publisher = publisher
        self._engine = engine
        self._restarts = restarts
        self._ranks = ranks
        self._shared, self._engine_bytes = shared, engine_bytes
        self.state = State.SERVING
        if shared:
            self._release()
            self.state = State.TRAINING

    def to_policy(self, policy: Trained, timer: Timer) -> None:
        """From serving to training. RuntimeError in another state, UserError if the engines
        released nothing.
        """
        if not self._shared:
            return
        with self._step("release", timer):
            self._release()
        with self._step("restore", timer):
            policy.restore_training_state()

    def to_engines(self, policy: Trained, version: int, timer: Timer) -> None:
        """From training to serving `policy`'s weights as `version`. RuntimeError in another state.

        What fails, fails on every rank, and leaves the engines paused or asleep.
        """
        if not self._shared:
            with timer("publish"):
                self._publisher.publish(policy, version)
            return
        with self._step("offload", timer):
            policy.offload_training_state()
            self._ranks.barrier()  # an engine's GPUs belong to several ranks
        with self._step("wake", timer):
            self._restarts.allow()
            self._on_engine(lambda engine: engine.wake(), "the engines' waking")
        with self._step("publish", timer):
            self._publisher.publish(policy, version)
            # caches take the memory next, on devices that belong to several ranks
            give_back_buckets()
            self._ranks.barrier()
        with self._step("resume", timer):
            self._on_engine(lambda engine: engine.resume(), "the engines' caches")

    @contextmanager
    def _step(self, name: str, timer: Timer) -> Iterator[None]:
        before, after = STEPS[name]
        if self.state is not before:
            raise RuntimeError(f"{name}: {self.state.value}")
        with timer(name):
            yield
        self.state = after

    def _on_engine(self, call: Callable[[Sleeper], None], what: str) -> None:
        engine = self._engine
        self._ranks.on_main(lambda: call(engine) if engine else None, what)

    def _release(self) -> None:
        self._restarts.hold()
        free = free_bytes()
        engine = self._engine
        asleep = self._ranks.share(lambda: engine.sleep() if engine else 0, "the engines' release")
        weights = asleep * self._engine_bytes
        freed = 0
        for _ in range(WAITS):
            freed = self._ranks.total(free_bytes() - free)
            if is_freed(freed, weights):
                return
            time.sleep(WAIT_S)
        raise UserError(
            "the engines were told to release their memory, and the GPUs have "
            f"{freed / 2**30:.2f} GiB more free; the engines' weights alone are "
            f"{weights / 2**30:.2f} GiB. Without its memory saver SGLang releases nothing: leave "
            "rollout.server.enable_memory_saver out (it is then true)"
        )


def give_back_buckets() -> None:
    """Give back to the GPU what the engines let go of, for their caches; a no-op without a GPU.

    torch holds a bucket whose handle an engine had until it is asked to look, and `empty_cache`
    does not ask.
    """
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def is_freed(freed: int, weights: int) -> bool:
    """True if `freed` bytes more on all GPUs are the engines' `weights`, if any were released."""
    return not weights or freed >= FREED * weights


def free_bytes() -> int:
    """Free bytes of this rank's GPU, whichever process has the rest; 0 if there is no GPU."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
