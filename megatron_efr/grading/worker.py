"""The grading process: reads (gold, answer) pairs from a pipe and asks math-verify; imports neither
torch nor types.

The parent reads this process's CPU time and memory and kills it at a limit. math-verify's own limit
rests on SIGALRM, which is blind inside C code and forbidden outside the main thread, so it is
switched off here.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection

from megatron_efr.grading import verifiers
from megatron_efr.grading.verdict import (
    BAD_GOLD,
    CORRECT,
    CRASH,
    MATH,
    MEMORY,
    UNPARSED,
    WRONG,
    Question,
    Verdict,
    Verifier,
)

_PARENT_S = 2.0  # how often a worker looks if its parent is there


def judge(gold: str, answer: str) -> str:
    """Status of `answer`, the content of a box, against `gold`; may hang or die, which is the
    parent's business.

    The gold comes first, since the comparison is not symmetric: if two readings are sensible, its
    form decides.
    """
    from megatron_efr.grading.algebra import UnreadableError
    from megatron_efr.grading.compare import is_answer, same_answer

    if not is_answer(gold):
        return BAD_GOLD
    try:
        return CORRECT if same_answer(gold, answer) else WRONG
    except MemoryError:
        return MEMORY
    except (UnreadableError, RecursionError):
        return UNPARSED
    except Exception:  # sympy raises what it likes on mathematics it cannot compare
        return CRASH


def verdict(question: Question) -> Verdict:
    """The verdict of the question's verifier; may hang or die, which is the parent's business."""
    # a gold is held against itself, and an answer is a gold for another one
    if question.verifier.name == MATH.name:
        return Verdict(
            judge(question.gold, question.gold if question.kind == "gold" else question.answer)
        )
    return verifiers.ask(question)


def serve(connection: Connection, timeout_s: float) -> None:
    """Answer every question of each chunk with (verdict, CPU seconds of this process), until the
    pipe ends.
    """
    connection.send((None, time.process_time()))
    while True:
        try:
            chunk = connection.recv()
        except (EOFError, ConnectionResetError):
            return  # the parent is done, or gone
        for question in chunk:
            _limit_cpu(timeout_s)
            connection.send((verdict(question), time.process_time()))


def _load(asked: tuple[Verifier, ...]) -> str:
    """Load verifiers before any response's clock, math if none is named; what is wrong with one, or
    nothing.
    """
    try:
        for verifier in asked or (MATH,):
            if verifier.name == MATH.name:
                _warm_up()
            else:
                verifiers.load(verifier.name, verifier.options)
    except verifiers.LoadError as error:
        return str(error)
    return ""


def _warm_up() -> None:
    """Let math-verify build its grammar and regular expressions, which its first use does."""
    for gold, answer in (("x+1", "1+x"), ("(1, \\sqrt{2})", "(1, 2^{1/2})"), ("\\pi", "3.14159")):
        judge(gold, answer)


def _end_with(parent: int) -> None:
    """End this process, and what it started, when the parent is gone: a verifier may be asleep and
    see no pipe end.
    """
    while os.getppid() == parent:
        time.sleep(_PARENT_S)
    os.killpg(0, signal.SIGKILL)


def _limit_cpu(timeout_s: float) -> None:
    """Let the kernel end this process should the parent be gone: whole seconds, so after the
    parent's own limit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + timeout_s) + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


def main() -> None:
    """The process's program; its arguments are a pipe's descriptor, CPU seconds a response, bytes
    of address space.
    """
    descriptor = int(sys.argv[1])
    timeout_s = float(sys.argv[2])
    address_space = int(sys.argv[3])
    # Ctrl-C is the parent's to handle: it closes the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space, hard))
    os.dup2(2, 1)  # what a plug-in prints is no part of a program's output
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    logging.disable(logging.WARNING)  # math-verify warns that its SIGALRM limit is off
    connection = Connection(descriptor)
    asked = connection.recv()
    if wrong := _load(asked):
        connection.send((wrong, time.process_time()))
        return
    serve(connection, timeout_s)
