"""Grades responses in worker processes that are killed at a limit of CPU time or memory, and
replaced.
"""

from __future__ import annotations

import contextlib
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

from megatron_efr.config import GradingConfig
from megatron_efr.config.grading import OPTIONS
from megatron_efr.errors import UserError
from megatron_efr.grading.extract import LAST_BOX, Extractor
from megatron_efr.grading.verdict import (
    CRASH,
    MATH,
    MEMORY,
    NO_ANSWER,
    STATUSES,
    TIMEOUT,
    WRONG,
    Question,
    Verdict,
    Verifier,
)
from megatron_efr.types import CORRECT, Grade

_POLL_S = 0.02  # how often busy workers' CPU time and memory are read
# pairs a worker is handed at once: long enough to hide the pipe, short enough to share the work
_CHUNK = 32
_STARTS = 3  # workers that may die in a row before they are ready
_START_CPU_S = 120.0  # CPU seconds that importing math-verify and plug-ins may take
_PLAIN_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


def count_statuses(grades: Sequence[Grade]) -> dict[str, int]:
    """Number of grades with each status, every status named, for metrics."""
    counts = Counter(grade.status for grade in grades)
    return {status: counts[status] for status in STATUSES}


def grade(
    responses: Sequence[str],
    golds: Sequence[str],
    timeout_s: float = 5.0,
    workers: int = 1,
    verifier: Verifier = MATH,
    extractor: Extractor = LAST_BOX,
) -> list[Grade]:
    """Grade each response text against the gold answer text beside it, in order.

    `timeout_s` is CPU seconds for one response. Starts its own workers and ends them; a program
    that grades often keeps a `Grader`. Raises ValueError when the two lengths differ.
    """
    with Grader(workers, timeout_s, verifiers=[verifier]) as grader:
        return grader.grade(responses, golds, verifier, extractor)


class GraderError(UserError, RuntimeError):
    """Grading processes cannot be started, or a verifier cannot be loaded."""


class Grader:
    """A pool of grading processes, started when first needed, each killed at a limit and replaced.

    `timeout_s` limits the CPU time of one response, not the wall clock, so that a loaded machine
    grades alike. `memory_bytes` limits a worker's resident memory. A worker that uses no CPU at all
    for `stall_s` wall seconds while it owes an answer (stopped, asleep, swapped out) is killed too,
    and with it what it started. `verifiers` are loaded when a worker starts, on no response's time;
    others when they are first asked. Calls from several threads take turns.
    """

    def __init__(
        self,
        workers: int = 1,
        timeout_s: float = 5.0,
        memory_bytes: int = 2 << 30,
        stall_s: float = 60.0,
        verifiers: Sequence[Verifier] = (),
    ) -> None:
        if workers < 1 or not timeout_s > 0:
            raise ValueError(
                f"a grader needs workers >= 1 and timeout_s > 0, got {workers} and {timeout_s}"
            )
        self._count = workers
        self._limits = _Limits(timeout_s, memory_bytes, stall_s)
        self._verifiers = tuple(verifiers)
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    @classmethod
    def of(cls, config: GradingConfig, verifiers: Sequence[Verifier] = ()) -> Grader:
        """A grader within the limits of the section `grading`."""
        return cls(config.workers, config.timeout_s, config.memory_mib << 20, verifiers=verifiers)

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

    def grade(
        self,
        responses: Sequence[str],
        golds: Sequence[str],
        verifier: Verifier = MATH,
        extractor: Extractor = LAST_BOX,
    ) -> list[Grade]:
        """Grade each response text against the gold answer text beside it, in order."""
        if len(responses) != len(golds):
            raise ValueError(
                f"{len(responses)} responses and {len(golds)} gold answers: give one gold per "
                "response"
            )
        answers = [
            extractor(response, gold) for response, gold in zip(responses, golds, strict=True)
        ]
        return self.compare(answers, golds, verifier)

    def compare(
        self, answers: Sequence[str | None], golds: Sequence[str], verifier: Verifier = MATH
    ) -> list[Grade]:
        """Grade answers already taken from their responses; None is no answer."""
        pairs = zip(answers, golds, strict=True)
        return self.ask(
            [None if answer is None else Question(verifier, gold, answer) for answer, gold in pairs]
        )

    def ask(self, questions: Sequence[Question | None]) -> list[Grade]:
        """Put questions to the verifiers, in order; None is a response without an answer. Equal
        ones are asked once.
        """
        found: dict[Question, Verdict] = {}
        for question in questions:
            if question is not None and question not in found:
                found[question] = Verdict(_plain_verdict(question))
        left = [question for question, verdict in found.items() if not verdict.status]
        with self._lock:
            found.update(zip(left, self._run(left), strict=True))
        return [Grade(NO_ANSWER) if q is None else _grade(q, found[q]) for q in questions]

    def _run(self, questions: list[Question]) -> list[Verdict]:
        """Verdicts on `questions`, in order, from the workers."""
        verdicts = [Verdict("")] * len(questions)
        waiting = deque(range(len(questions)))
        checked = time.monotonic()
        try:
            # a worker that is still starting is heard too: it may die of it
            while waiting or any(worker.jobs for worker in self._workers):
                self._hand_out(questions, waiting)
                active = {
                    worker.connection: worker
                    for worker in self._workers
                    if worker.jobs or not worker.ready
                }
                for connection in wait(list(active), timeout=_POLL_S):
                    worker = active[connection]  # pyright: ignore[reportArgumentType]
                    if not worker.receive(verdicts, self._limits):
                        self._bury(worker, worker.cause_of_death(), verdicts, waiting)
                    elif worker.ready:
                        self._failed_starts = 0
                # CPU, memory and stalls are watched from outside: a verifier may never return
                if time.monotonic() - checked >= _POLL_S:
                    for worker in [worker for worker in self._workers if worker in active.values()]:
                        if excess := worker.excess(self._limits):
                            self._bury(worker, excess, verdicts, waiting)
                    checked = time.monotonic()
        except BaseException:
            # an interrupted call leaves answers in the pipes that belong to nobody
            _end_all(self._workers)
            raise
        return verdicts

    def _hand_out(self, questions: list[Question], waiting: deque[int]) -> None:
        """Give idle workers a chunk each, and start workers while there is more to do than they can
        take.
        """
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
                worker.connection.send([questions[index] for index in chunk])
            # it died idle, which is no response's doing
            except (BrokenPipeError, ConnectionResetError):
                worker.jobs.clear()
                waiting.extendleft(reversed(chunk))
                self._remove(worker)
        starting = sum(not worker.ready for worker in self._workers)
        while len(self._workers) < self._count and starting < len(waiting):
            self._workers.append(_Worker(self._limits, self._verifiers))
            starting += 1

    def _bury(
        self, worker: _Worker, cause: Verdict, verdicts: list[Verdict], waiting: deque[int]
    ) -> None:
        """Remove a worker that died or must; the response it was on gets `cause`, the others go to
        the next one.
        """
        if worker.jobs:
            verdicts[worker.jobs.popleft()] = cause
            waiting.extendleft(reversed(worker.jobs))
        elif not worker.ready:
            self._failed_starts += 1
        self._remove(worker)
        if self._failed_starts >= _STARTS:
            raise GraderError(
                (
                    f"{_STARTS} grading processes in a row died before they were ready (last exit "
                    f"status {worker.process.returncode}); `{sys.executable} -c 'import "
                    "math_verify'` may show why"
                )
                + "".join(f", or importing the verifier {name}" for name in worker.plugins)
            )

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()


@dataclass(frozen=True, slots=True)
class _Limits:
    timeout_s: float  # CPU seconds for one response
    memory_bytes: int  # resident
    stall_s: float  # wall seconds without any CPU use

    @property
    def timeout(self) -> Verdict:
        """The verdict on a response that took too long."""
        return Verdict(TIMEOUT, None, f"more than {self.timeout_s:g} s of CPU")


@dataclass(slots=True, eq=False)
class _Worker:
    """One grading process as its parent sees it; `jobs` are the pairs it was handed and has not
    answered, in order.
    """

    limits: _Limits
    verifiers: tuple[Verifier, ...] = ()
    command: list[str] = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)
    connection: Connection = field(init=False)
    usage: psutil.Process = field(init=False)
    jobs: deque[int] = field(default_factory=deque)
    ready: bool = False
    answered: int = 0
    cpu_before: float = 0.0  # CPU seconds it had used when it finished its last response
    cpu_seen: float = 0.0
    # wall clock when its CPU time last advanced
    moved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Start the process: a bare interpreter, since multiprocessing would import the program's
        own main module.
        """
        self.connection, theirs = Pipe()
        # RLIMIT_AS stops a single allocation that outruns the parent's watch on resident memory.
        address_space = 2 * self.limits.memory_bytes + (1 << 30)
        arguments = [str(theirs.fileno()), str(self.limits.timeout_s), str(address_space)]
        self.command = [
            sys.executable,
            "-c",
            "from megatron_efr.grading.worker import main; main()",
            *arguments,
        ]
        # the package is found as this process found it, installed or not
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        # A fixed hash seed makes sympy walk its sets in one order, hence take the same path to a
        # verdict, every time.
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
        }
        # in a session of its own, which ends what a plug-in starts with it
        self.process = subprocess.Popen(
            self.command,
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        # it died at once: its pipe says so
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(self.verifiers)
        self.usage = psutil.Process(self.process.pid)

    def receive(self, verdicts: list[Verdict], limits: _Limits) -> bool:
        """Take one message and store its verdict; False when the process is gone. GraderError if it
        cannot begin.
        """
        try:
            said, cpu = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return False
        if isinstance(said, str):
            raise GraderError(said)
        if self.ready:
            # The parent looks every few hundredths of a second; the worker's own clock settles what
            # ended in between.
            over = cpu - self.cpu_before > limits.timeout_s
            verdicts[self.jobs.popleft()] = limits.timeout if over else said
            self.answered += 1
        self.ready = True
        self.cpu_before = self.cpu_seen = cpu
        self.moved = time.monotonic()
        return True

    def excess(self, limits: _Limits) -> Verdict | None:
        """The limit that the process is over; None if it is within all."""
        now = time.monotonic()
        try:
            times = self.usage.cpu_times()
            resident = self.usage.memory_info().rss
        except psutil.Error:
            return None  # it just died: its pipe has ended, and says so on the next turn
        cpu = times.user + times.system
        if cpu > self.cpu_seen:
            self.cpu_seen, self.moved = cpu, now
        if resident > limits.memory_bytes:
            return Verdict(MEMORY, None, f"more than {limits.memory_bytes >> 20} MiB")
        if not self.ready and cpu > _START_CPU_S:
            return limits.timeout
        if self.ready and self.jobs and cpu - self.cpu_before > limits.timeout_s:
            return limits.timeout
        stalled = now - self.moved > limits.stall_s
        return Verdict(CRASH, None, f"no CPU used for {limits.stall_s:g} s") if stalled else None

    def bloated(self, limits: _Limits) -> bool:
        """True if what earlier responses left in sympy's caches would count against the next
        one.
        """
        if not self.answered:
            return False  # a fresh process holds no leftovers, however small the limit
        try:
            return self.usage.memory_info().rss > limits.memory_bytes // 2
        except psutil.Error:
            return True

    @property
    def plugins(self) -> list[str]:
        """Names of verifiers that are imported when it starts."""
        return [verifier.name for verifier in self.verifiers if verifier.name not in OPTIONS]

    def cause_of_death(self) -> Verdict:
        """Verdict on the response that the process, now gone, was working on."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            # and lives on: about to be killed
            return Verdict(CRASH, None, "its process closed the pipe")
        if code == -signal.SIGXCPU:
            return self.limits.timeout
        return Verdict(CRASH, None, f"its process ended with exit status {code}")

    def end(self) -> None:
        """Kill the process, and what it started, and reap it."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def _end_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()


def _grade(question: Question, verdict: Verdict) -> Grade:
    return Grade(verdict.status, verdict.score, question.answer, verdict.reason)


def _plain_verdict(question: Question) -> str:
    """The status if it needs no mathematics, else empty: two integers in plain digits, of at most
    18.

    math-verify reads each as that sympy Integer, in a box or between dollars, and compares Integers
    exactly, so the verdicts are the same (a test holds them against each other).
    """
    verifier, gold, answer, _ = question
    if (
        verifier.name == MATH.name
        and _PLAIN_INTEGER.fullmatch(gold)
        and _PLAIN_INTEGER.fullmatch(answer)
    ):
        return CORRECT if gold == answer else WRONG
    return ""
