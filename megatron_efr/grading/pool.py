"""Grades responses in worker processes that are killed at a limit of CPU time or memory, and replaced."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import psutil

from megatron_efr.errors import UserError
from megatron_efr.grading.boxed import last_boxed
from megatron_efr.grading.worker import BAD_GOLD, CORRECT, CRASH, MEMORY, UNPARSED, WRONG

NO_ANSWER = "no_answer"
TIMEOUT = "timeout"
STATUSES = (CORRECT, WRONG, NO_ANSWER, UNPARSED, TIMEOUT, MEMORY, CRASH, BAD_GOLD)

_POLL_S = 0.02  # how often busy workers' CPU time and memory are read
_CHUNK = 32  # pairs a worker is handed at once: long enough to hide the pipe, short enough to share the work
_STARTS = 3  # workers that may die in a row before they are ready
_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class Grade:
    """The verdict on one response; `status` is one of STATUSES.

    correct, wrong: math-verify compared the last box with the gold answer. no_answer: no box, an empty one, or a last
    box that never closes. unparsed: the box holds no expression. timeout: the CPU limit. memory: the memory limit.
    crash: the comparison raised, or its process died or hung without using CPU. bad_gold: the gold does not parse.
    """

    status: str

    @property
    def correct(self) -> bool:
        return self.status == CORRECT


def count_statuses(grades: Sequence[Grade]) -> dict[str, int]:
    """How many grades have each status, every status named, for metrics."""
    counts = Counter(grade.status for grade in grades)
    return {status: counts[status] for status in STATUSES}


def grade(responses: Sequence[str], golds: Sequence[str], timeout_s: float = 5.0, workers: int = 1) -> list[Grade]:
    """Grade each response text against the gold answer text beside it, in order.

    `timeout_s` is CPU seconds for one response. Starts its own workers and ends them; a program that grades often
    keeps a `Grader`. Raises ValueError when the two lengths differ.
    """
    with Grader(workers, timeout_s) as grader:
        return grader.grade(responses, golds)


class GraderError(UserError, RuntimeError):
    """Grading processes cannot be started."""


class Grader:
    """A pool of grading processes, started when first needed, each killed at a limit and replaced.

    `timeout_s` limits the CPU time of one response, not the wall clock, so that a loaded machine grades alike.
    `memory_bytes` limits a worker's resident memory. A worker that uses no CPU at all for `stall_s` wall seconds while
    it owes an answer (stopped, asleep, swapped out) is killed too. Calls from several threads take turns.
    """

    def __init__(
        self, workers: int = 1, timeout_s: float = 5.0, memory_bytes: int = 2 << 30, stall_s: float = 60.0
    ) -> None:
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"a grader needs workers >= 1 and timeout_s > 0, got {workers} and {timeout_s}")
        self._count = workers
        self._limits = _Limits(timeout_s, memory_bytes, stall_s)
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; the grader starts new ones if it is used again."""
        with self._lock:
            _end_all(self._workers)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are running now."""
        return [worker.process.pid for worker in self._workers]

    def grade(self, responses: Sequence[str], golds: Sequence[str]) -> list[Grade]:
        """Grade each response text against the gold answer text beside it, in order."""
        if len(responses) != len(golds):
            raise ValueError(f"{len(responses)} responses and {len(golds)} gold answers: give one gold per response")
        return self.compare([last_boxed(response) for response in responses], golds)

    def compare(self, answers: Sequence[str | None], golds: Sequence[str]) -> list[Grade]:
        """Grade answers already taken from their boxes; None is no answer. Equal pairs are compared once."""
        pairs: dict[tuple[str, str], str] = {}
        for gold, answer in zip(golds, answers, strict=True):
            if answer is not None and (gold, answer) not in pairs:
                pairs[gold, answer] = _plain_verdict(gold, answer)
        open_pairs = [pair for pair, status in pairs.items() if not status]
        with self._lock:
            pairs.update(zip(open_pairs, self._run(open_pairs), strict=True))
        return [
            Grade(NO_ANSWER if answer is None else pairs[gold, answer])
            for gold, answer in zip(golds, answers, strict=True)
        ]

    def _run(self, pairs: list[tuple[str, str]]) -> list[str]:
        """Statuses of `pairs`, in order, from the workers."""
        statuses = [""] * len(pairs)
        waiting = deque(range(len(pairs)))
        checked = time.monotonic()
        try:
            while waiting or any(worker.jobs for worker in self._workers):
                self._hand_out(pairs, waiting)
                active = {worker.connection: worker for worker in self._workers if worker.jobs or not worker.ready}
                for connection in wait(list(active), timeout=_POLL_S):
                    worker = active[connection]  # pyright: ignore[reportArgumentType]
                    if not worker.receive(statuses, self._limits):
                        self._bury(worker, worker.cause_of_death(), statuses, waiting)
                    elif worker.ready:
                        self._failed_starts = 0
                if time.monotonic() - checked >= _POLL_S:
                    for worker in [worker for worker in self._workers if worker in active.values()]:
                        if excess := worker.excess(self._limits):
                            self._bury(worker, excess, statuses, waiting)
                    checked = time.monotonic()
        except BaseException:
            _end_all(self._workers)  # an interrupted call leaves answers in the pipes that belong to nobody
            raise
        return statuses

    def _hand_out(self, pairs: list[tuple[str, str]], waiting: deque[int]) -> None:
        """Give idle workers a chunk each, and start workers while there is more to do than they can take."""
        idle = [worker for worker in self._workers if worker.ready and not worker.jobs]
        for worker in idle:
            if not waiting:
                return
            if worker.bloated(self._limits):
                self._remove(worker)
                continue
            share = -(-len(waiting) // self._count)
            chunk = [waiting.popleft() for _ in range(min(_CHUNK, share))]
            worker.jobs.extend(chunk)
            try:
                worker.connection.send([pairs[index] for index in chunk])
            except (BrokenPipeError, ConnectionResetError):  # it died idle, which is no response's doing
                worker.jobs.clear()
                waiting.extendleft(reversed(chunk))
                self._remove(worker)
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self._count and starting < len(waiting):
            self._workers.append(_Worker(self._limits))
            starting += 1

    def _bury(self, worker: _Worker, cause: str, statuses: list[str], waiting: deque[int]) -> None:
        """Remove a worker that died or must; the response it was on gets `cause`, the others go to the next one."""
        if worker.jobs:
            statuses[worker.jobs.popleft()] = cause
            waiting.extendleft(reversed(worker.jobs))
        elif not worker.ready:
            self._failed_starts += 1
        self._remove(worker)
        if self._failed_starts >= _STARTS:
            raise GraderError(
                f"{_STARTS} grading processes in a row died before they were ready (last exit status "
                f"{worker.process.returncode}); `{sys.executable} -c 'import math_verify'` may show why"
            )

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()


@dataclass(frozen=True, slots=True)
class _Limits:
    timeout_s: float  # CPU seconds for one response
    memory_bytes: int  # resident
    stall_s: float  # wall seconds without any CPU use


@dataclass(slots=True, eq=False)
class _Worker:
    """One grading process as its parent sees it; `jobs` are the pairs it was handed and has not answered, in order."""

    limits: _Limits
    command: list[str] = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)
    connection: Connection = field(init=False)
    usage: psutil.Process = field(init=False)
    jobs: deque[int] = field(default_factory=deque)
    ready: bool = False
    answered: int = 0
    cpu_before: float = 0.0  # CPU seconds it had used when it finished its last response
    cpu_seen: float = 0.0
    moved: float = field(default_factory=time.monotonic)  # wall clock when its CPU time last advanced

    def __post_init__(self) -> None:
        """Start the process: a bare interpreter, since multiprocessing would import the program's own main module."""
        self.connection, theirs = Pipe()
        # RLIMIT_AS stops a single allocation that outruns the parent's watch on resident memory.
        address_space = 2 * self.limits.memory_bytes + (1 << 30)
        arguments = [str(theirs.fileno()), str(self.limits.timeout_s), str(address_space)]
        self.command = [sys.executable, "-c", "from megatron_efr.grading.worker import main; main()", *arguments]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        # A fixed hash seed makes sympy walk its sets in one order, hence take the same path to a verdict, every time.
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            self.command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.usage = psutil.Process(self.process.pid)

    def receive(self, statuses: list[str], limits: _Limits) -> bool:
        """Take one message and store its status; False when the process is gone."""
        try:
            status, cpu = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return False
        if self.ready:
            # The parent looks every few hundredths of a second; the worker's own clock settles what ended in between.
            over = cpu - self.cpu_before > limits.timeout_s
            statuses[self.jobs.popleft()] = TIMEOUT if over else status
            self.answered += 1
        self.ready = True
        self.cpu_before = self.cpu_seen = cpu
        self.moved = time.monotonic()
        return True

    def excess(self, limits: _Limits) -> str:
        """Which limit the process is over, as a status; empty when none."""
        now = time.monotonic()
        try:
            times = self.usage.cpu_times()
            resident = self.usage.memory_info().rss
        except psutil.Error:
            return ""  # it just died: its pipe has ended, and says so on the next turn
        cpu = times.user + times.system
        if cpu > self.cpu_seen:
            self.cpu_seen, self.moved = cpu, now
        if resident > limits.memory_bytes:
            return MEMORY
        if self.ready and self.jobs and cpu - self.cpu_before > limits.timeout_s:
            return TIMEOUT
        return CRASH if now - self.moved > limits.stall_s else ""

    def bloated(self, limits: _Limits) -> bool:
        """Whether what earlier responses left in sympy's caches would count against the next one."""
        if not self.answered:
            return False  # a fresh process holds no leftovers, however small the limit
        try:
            return self.usage.memory_info().rss > limits.memory_bytes // 2
        except psutil.Error:
            return True

    def cause_of_death(self) -> str:
        """Status of the response that the process, now gone, was working on."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return CRASH  # it closed its pipe and lives on: about to be killed
        return TIMEOUT if code == -signal.SIGXCPU else CRASH

    def end(self) -> None:
        """Kill the process and reap it."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


def _plain_verdict(gold: str, answer: str) -> str:
    """The verdict where it needs no mathematics, else empty: two integers in plain digits, of at most 18.

    math-verify reads each as that sympy Integer, in a box or between dollars, and compares Integers exactly, so the
    verdicts are the same (a test holds them against each other).
    """
    if _PLAIN_INTEGER.fullmatch(gold) and _PLAIN_INTEGER.fullmatch(answer):
        return CORRECT if gold == answer else WRONG
    return ""
