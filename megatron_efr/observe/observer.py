"""Takes a run's metrics to metrics.jsonl, TensorBoard, wandb and the terminal; times phases; has a
watchdog.

Convention: a metric under `time/` depends on the machine (seconds, speeds, memory), one under
`engine/` on what befell it (servers lost); every other metric is a function of configuration and
seed alone. `deterministic` keeps the latter: they are what a killed and resumed run must reproduce.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_efr.config import ConfigError, ObserveConfig
from megatron_efr.durable import GOES_ON, writing
from megatron_efr.log import duration
from megatron_efr.observe.peak_memory import Peaks

MACHINE = "time/"
"""Prefix of the metrics that the machine decides and not the seed."""

FAULTS = "engine/"
"""Prefix of those that say what befell the engines."""

EXIT_STUCK = 124
"""Exit code of a process that its watchdog ended (the one `timeout` uses)."""


def deterministic(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics` without those that depend on the machine (`time/...`, `engine/...`)."""
    return {key: value for key, value in metrics.items() if not key.startswith((MACHINE, FAULTS))}


class Folder(Protocol):
    """The part of a run folder that an observer writes to."""

    path: Path

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> None: ...


class Column(NamedTuple):
    """One figure of the progress line: the metric, its label, how it is written, its style on a
    terminal.
    """

    key: str
    label: str
    write: Callable[[float], str]
    style: str


def _speed(value: float) -> str:
    return f"{value / 1000:5.1f}k" if value >= 1000 else f"{value:6.0f}"


COLUMNS = (
    Column("accuracy", "accuracy", lambda v: f"{v:6.1%}", "bold green"),
    Column("tokens_mean", "tokens", lambda v: f"{v:7.1f}", "bold cyan"),
    Column("reward_mean", "reward", lambda v: f"{v:6.3f}", ""),
    Column("loss", "loss", lambda v: f"{v:8.4f}", ""),
    Column("kl", "KL", lambda v: f"{v:8.5f}", ""),
    Column("grad_norm", "grad", lambda v: f"{v:6.3f}", ""),
    Column("time/tokens_per_s", "tok/s", _speed, "dim"),
    Column("eval/accuracy", "held-out accuracy", lambda v: f"{v:6.1%}", "bold green"),
    Column("eval/tokens", "tokens", lambda v: f"{v:7.1f}", "bold cyan"),
)


class Watchdog:
    """Ends the process when one phase lasts longer than `limit_s` seconds.

    It names the phase and the rank, writes every thread's stack to stderr and to
    `folder`/stuck_rank<rank>.txt, and exits with EXIT_STUCK, so that the launcher ends the other
    ranks too. It is a Python thread: a call that never releases the interpreter lock stops it as
    well. Time outside any phase is watched as "between phases".
    """

    def __init__(self, limit_s: float, rank: int = 0, folder: Path | None = None) -> None:
        if not limit_s > 0:
            raise ValueError(f"watchdog limit of {limit_s} seconds: give a positive number")
        self.limit_s = limit_s
        self.rank = rank
        self.folder = folder
        self._phase = "start"
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, phase: str) -> None:
        """The process is alive and now in `phase`; the clock starts again."""
        self._phase = phase
        self._since = time.monotonic()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(self.limit_s / 4, 5.0)):
            stuck_s = time.monotonic() - self._since
            if stuck_s > self.limit_s:
                self._end(stuck_s)

    def _end(self, stuck_s: float) -> None:
        message = (
            f"watchdog: rank {self.rank} has been in phase {self._phase!r} for {duration(stuck_s)} "
            f"(limit {duration(self.limit_s)}); ending the process with exit code {EXIT_STUCK}\n"
        )
        if self.folder is not None:
            with contextlib.suppress(OSError):  # a full disk must not keep a stuck process alive
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(
                    self.folder / f"stuck_rank{self.rank}.txt", "w", encoding="utf-8"
                ) as file:
                    file.write(message)
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
        os.write(2, message.encode())
        faulthandler.dump_traceback(2, all_threads=True)
        os._exit(EXIT_STUCK)


class Observer:
    """Takes every step's metrics on every rank; rank 0 writes and prints them, the others only keep
    time.

    `folder` is the run folder, `total_steps` the last step's number, `start_step` the step resumed
    from (0: none). `name` is how wandb calls the run; `largest`, which all ranks call together,
    gives each figure's maximum over them. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        folder: Folder,
        config: ObserveConfig,
        total_steps: int,
        rank: int = 0,
        start_step: int = 0,
        name: str = "",
        largest: Callable[[Mapping[str, float]], dict[str, float]] = dict,
    ) -> None:
        self.folder = folder
        self.total_steps = total_steps
        self.rank = rank
        limit = config.watchdog_s
        self.watchdog = None if limit is None else Watchdog(limit, rank, folder.path)
        self._largest = largest
        self._peaks = Peaks()
        self._seconds: dict[str, float] = {}
        self._phases: list[str] = []
        self._step = start_step
        self._since = time.perf_counter()
        self._outputs: list[_Output] = []
        if rank == 0:
            if config.wandb is not None:
                self._outputs.append(_Wandb(config.wandb, folder.path, name or folder.path.name))
            if config.tensorboard:
                self._outputs.append(_TensorBoard(folder.path / "tensorboard", start_step))
            self._outputs.append(_terminal(total_steps, start_step))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time this block into `time/<name>` of the step (phases of one name add up) and tell the
        watchdog.

        Its peak memory is noted too: see `Peaks`. Phases nest; they belong to one thread.
        """
        began = time.perf_counter()
        self._phases.append(name)
        self._peaks.enter(name)
        self._now_in(name)
        try:
            yield
        finally:
            self._peaks.leave()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began
            self._phases.pop()
            self._now_in(self._phases[-1] if self._phases else "")

    def _now_in(self, phase: str) -> None:
        if self.watchdog is not None:
            self.watchdog.beat(phase or "between phases")
        for output in self._outputs:
            output.phase(phase)

    def seconds(self, phase: str) -> float:
        """Seconds spent in `phase` since the last `log`; 0.0 if it has not been entered."""
        return self._seconds.get(phase, 0.0)

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write `metrics` of `step` with the phases' seconds since the last call, and return what
        was written.

        Added: `time/<phase>`, `time/total` (seconds since the last call) and peak memory, the
        largest of all ranks: `time/<phase>_memory_gib` and, over the whole run so far,
        `time/memory_gib`; on a GPU also `.._cuda_memory_gib` and `.._device_gib`. What `metrics`
        holds itself under these names is kept.
        """
        now = time.perf_counter()
        machine = {f"{MACHINE}{name}": seconds for name, seconds in self._seconds.items()}
        machine[f"{MACHINE}total"] = now - self._since
        machine |= {
            f"{MACHINE}{name}": gib for name, gib in self._largest(self._peaks.take()).items()
        }
        kept = deterministic(metrics)
        written = {
            **kept,
            **machine,
            **{key: value for key, value in metrics.items() if key not in kept},
        }
        if self.rank == 0:
            self.folder.append_metrics(step, written)
            for output in self._outputs:
                output.log(step, written, (now - self._since) / max(step - self._step, 1))
        self._seconds = {}
        self._step = step
        self._since = now
        return written

    def close(self) -> None:
        """Finish every output and stop the watchdog."""
        for output in self._outputs:
            output.close()
        self._outputs = []
        if self.watchdog is not None:
            self.watchdog.close()

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Output(ABC):
    """Somewhere that metrics go."""

    def phase(self, name: str) -> None:
        """The run is in this phase now; most outputs do not show it."""
        return

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, Any], seconds_per_step: float) -> None: ...

    def close(self) -> None:
        """Nothing more will come; most outputs have nothing to finish."""
        return


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if hasattr(value, "__float__")}


class _TensorBoard(_Output):
    def __init__(self, folder: Path, start_step: int) -> None:
        # seconds to import: only where it is used
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        with writing(folder, GOES_ON):
            # purge_step hides what an interrupted run logged after the step that is resumed from
            self.writer = SummaryWriter(
                str(folder), purge_step=start_step + 1 if start_step else None
            )

    def log(self, step: int, metrics: Mapping[str, Any], seconds_per_step: float) -> None:
        with writing(self.folder, GOES_ON):
            for key, value in _numbers(metrics).items():
                self.writer.add_scalar(key, value, step)
            self.writer.flush()

    def close(self) -> None:
        with writing(self.folder, GOES_ON):
            self.writer.close()


class _Wandb(_Output):
    def __init__(self, project: str, folder: Path, name: str) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == "wandb"
            found = "is not installed" if absent else f"does not import ({error})"
            raise ConfigError(
                f"observe.wandb: {project!r} asks for wandb, which {found}; "
                f"pip install 'megatron-efr[wandb]', or set observe.wandb: null"
            ) from error
        # one id per run name, so that a resumed run goes on in the same chart
        self.run = wandb.init(
            project=project, name=name, id=name.replace("/", "-"), dir=str(folder), resume="allow"
        )

    def log(self, step: int, metrics: Mapping[str, Any], seconds_per_step: float) -> None:
        self.run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


def _terminal(total_steps: int, start_step: int) -> _Output:
    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return _LiveTerminal(console, total_steps, start_step)
    return _PlainTerminal(total_steps)


class _PlainTerminal(_Output):
    """One aligned line per step, without control codes: for logs, pipes and CI."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._recent: deque[float] = deque(maxlen=10)

    def log(self, step: int, metrics: Mapping[str, Any], seconds_per_step: float) -> None:
        print(
            "  ".join(text for text, _style in self.cells(step, metrics, seconds_per_step)),
            flush=True,
        )

    def cells(
        self, step: int, metrics: Mapping[str, Any], seconds_per_step: float
    ) -> list[tuple[str, str]]:
        """(text, style) of each figure that `metrics` has, the time left last (mean of the last ten
        steps).
        """
        self._recent.append(seconds_per_step)
        left = sum(self._recent) / len(self._recent) * max(self.total_steps - step, 0)
        width = len(str(self.total_steps))
        numbers = _numbers(metrics)
        return [
            (f"{step:>{width}}/{self.total_steps}", "bold"),
            *(
                (f"{c.label} {c.write(numbers[c.key])}", c.style)
                for c in COLUMNS
                if c.key in numbers
            ),
            (f"left {duration(left):>6}" if step < self.total_steps else "done", "dim"),
        ]


class _LiveTerminal(_PlainTerminal):
    """The same lines in colour, above a bar that names the phase the run is in."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        super().__init__(total_steps)
        self.bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[phase]}", style="dim"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("", total=total_steps, completed=start_step, phase="")
        self.bar.start()

    def phase(self, name: str) -> None:
        self.bar.update(self.task, phase=name)

    def log(self, step: int, metrics: Mapping[str, Any], seconds_per_step: float) -> None:
        cells = self.cells(step, metrics, seconds_per_step)
        self.bar.console.print(
            "  ".join(f"[{style}]{text}[/]" if style else text for text, style in cells)
        )
        self.bar.update(self.task, completed=step)

    def close(self) -> None:
        self.bar.stop()
