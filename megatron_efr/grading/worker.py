"""The grading process: reads (gold, answer) pairs from a pipe and asks math-verify; imports neither torch nor types.

The parent reads this process's CPU time and memory and kills it at a limit. math-verify's own limit rests on SIGALRM,
which is blind inside C code and forbidden outside the main thread, so it is switched off here.
"""

from __future__ import annotations

import logging
import math
import re
import resource
import signal
import sys
import time
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

CORRECT = "correct"
WRONG = "wrong"
UNPARSED = "unparsed"
CRASH = "crash"
MEMORY = "memory"
BAD_GOLD = "bad_gold"

_OWN_MATH = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")  # the gold brings its own math environment


def judge(gold: str, answer: str) -> str:
    """Status of `answer`, the content of a box, against `gold`; may hang or die, which is the parent's business.

    The gold comes first, since math-verify's comparison is not symmetric: a gold `1 < x < 2` accepts the interval
    `(1, 2)`, and a gold `(1, 2)` does not accept `1 < x < 2`.
    """
    from math_verify import parse, verify

    golds = _parse_gold(gold)
    if not _expressions(golds):
        return BAD_GOLD
    try:
        targets = parse(f"\\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]
    except MemoryError:
        return MEMORY
    except Exception:  # whatever the parser trips over (recursion, digits without end), this text is no expression
        return UNPARSED
    raised = None
    try:
        right = verify(golds, targets, timeout_seconds=None, raise_on_error=True)
    except Exception as error:
        # One pair of readings cannot be compared; math-verify's verdict is over all pairs, so ask for that.
        raised = MEMORY if isinstance(error, MemoryError) else CRASH
        right = verify(golds, targets, timeout_seconds=None)
    if right:
        return CORRECT
    return raised or (WRONG if _expressions(targets) else UNPARSED)


@lru_cache(maxsize=8192)
def _parse_gold(gold: str) -> list[Any]:
    from math_verify import parse

    return parse(gold if _OWN_MATH.search(gold) else f"${gold}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _expressions(readings: list[Any]) -> list[Any]:
    """What math-verify read as mathematics; the rest are bare strings it falls back to."""
    return [reading for reading in readings if not isinstance(reading, str)]


def serve(connection: Connection, timeout_s: float) -> None:
    """Answer every (gold, answer) of each chunk with (status, CPU seconds of this process), until the pipe ends."""
    connection.send(("ready", time.process_time()))
    while True:
        try:
            chunk = connection.recv()
        except (EOFError, ConnectionResetError):
            return  # the parent is done, or gone
        for gold, answer in chunk:
            _limit_cpu(timeout_s)
            connection.send((judge(gold, answer), time.process_time()))


def _limit_cpu(timeout_s: float) -> None:
    """Let the kernel end this process should the parent be gone: whole seconds, so after the parent's own limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + timeout_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    """The process's program; its arguments are a pipe's descriptor, CPU seconds a response, bytes of address space."""
    descriptor, timeout_s, address_space = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it closes the pipe
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space, hard))
    logging.disable(logging.WARNING)  # math-verify warns that its SIGALRM limit is off
    # The first use of math-verify builds its grammar and regular expressions: pay that before any response's clock.
    for warm in ("\\frac{1}{2}", "(1, \\sqrt{2})", "x=5"):
        judge(warm, warm)
    serve(Connection(descriptor), timeout_s)
