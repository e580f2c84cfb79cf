"""Runs a program and kills it from within (SIGKILL) at a stated moment: `python killed.py MOMENT
PROGRAM ARGUMENTS...`.

rollout:STEP:GROUPS  while group GROUPS + 1 of iteration STEP is being written to the journal: half of its line is there
answer:GROUPS        while group GROUPS + 1 of an evaluation is being written to its journal
servers:GROUPS       not killed: its SGLang servers are, after group GROUPS of an evaluation is in its journal
update:N             before this process's N-th optimizer update
logged:STEP          after the metrics line of STEP, while the next line is being written
save:STEP            while Megatron's files of STEP's checkpoint are being written
background:STEP      while STEP's checkpoint is being written in the background and a later iteration trains
seconds:S            S seconds after the policy began to be built, wherever the program is then
working:S            S seconds after it owned its folder or record, wherever the program is then
stuck:N              not killed: its N-th optimizer update never ends
renamed:STEP         when STEP's checkpoint is in place, before it has been verified and `latest` has moved
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(path: Path, line: str) -> None:
    with path.open("ab") as file:
        file.write(line.encode()[: len(line) // 2])


def at_rollout(step: str, groups: str) -> None:
    at_journal(f"step_{int(step):06d}.jsonl", groups)


def at_answer(groups: str) -> None:
    at_journal("unfinished/*.jsonl", groups)


def at_servers(groups: str) -> None:
    import psutil

    from megatron_efr.rollout import journal

    append = journal.Journal.append

    def hooked(self: journal.Journal, group: Any) -> None:
        append(self, group)
        if self.path.match("unfinished/*.jsonl") and self.path.read_bytes().count(b"\n") == int(
            groups
        ):
            for child in psutil.Process().children():
                if "sglang.launch_server" in child.cmdline():
                    child.kill()  # a supervisor, and the kernel what it runs

    journal.Journal.append = hooked


def at_journal(pattern: str, groups: str) -> None:
    from megatron_efr.rollout import journal

    append = journal.Journal.append

    def hooked(self: journal.Journal, group: Any) -> None:
        if (
            self.path.match(pattern)
            and self.path.exists()
            and self.path.read_bytes().count(b"\n") == int(groups)
        ):
            write_half(self.path, journal.encode_group(group))
            die()
        append(self, group)

    journal.Journal.append = hooked


def at_update(number: str) -> None:
    from megatron_efr.policy import Policy

    update, calls = Policy.update, iter(range(1, 10**9))

    def hooked(self: Policy, *arguments: Any) -> Any:
        if next(calls) == int(number):
            die()
        return update(self, *arguments)

    Policy.update = hooked


def at_stuck(number: str) -> None:
    from megatron_efr.policy import Policy

    update, calls = Policy.update, iter(range(1, 10**9))

    def hooked(self: Policy, *arguments: Any) -> Any:
        if next(calls) == int(number):
            threading.Event().wait()
        return update(self, *arguments)

    Policy.update = hooked


def at_logged(step: str) -> None:
    from megatron_efr.run.folder import RunFolder

    append = RunFolder.append_metrics

    def hooked(self: RunFolder, at: int, metrics: Any) -> None:
        append(self, at, metrics)
        if at == int(step):
            write_half(self.metrics, '{"step": 99, "accuracy": 0.5}')
            die()

    RunFolder.append_metrics = hooked


def at_save(step: str) -> None:
    from torch.distributed.checkpoint import FileSystemWriter

    finish = FileSystemWriter.finish

    def hooked(self: FileSystemWriter, **arguments: Any) -> None:
        partial = Path(self.path)
        if partial.name == f"step_{int(step):06d}.partial":
            [data] = partial.glob("*.distcp")
            os.truncate(data, data.stat().st_size // 2)
            die()
        finish(self, **arguments)

    FileSystemWriter.finish = hooked


def at_background(step: str) -> None:
    from torch.distributed.checkpoint import FileSystemWriter

    from megatron_efr.policy import Policy

    write, update = FileSystemWriter.write_data, Policy.update
    writing, training = threading.Event(), threading.Event()

    def hooked_write(self: FileSystemWriter, *arguments: Any) -> Any:
        written = write(self, *arguments)
        partial = Path(self.path)
        if partial.name == f"step_{int(step):06d}.partial":
            [data] = partial.glob("*.distcp")
            os.truncate(data, data.stat().st_size // 2)
            writing.set()
            assert training.wait(60)
            die()
        return written

    def hooked_update(self: Policy, *arguments: Any) -> Any:
        if writing.is_set():
            training.set()
        return update(self, *arguments)

    FileSystemWriter.write_data, Policy.update = hooked_write, hooked_update


def at_renamed(step: str) -> None:
    from megatron_efr.checkpoint import checkpoints as checkpoint

    verify = checkpoint.verify

    def hooked(path: Path) -> None:
        if (path.parent / checkpoint.LATEST).exists() and path.name == checkpoint.name(int(step)):
            die()
        verify(path)

    checkpoint.verify = hooked


def at_seconds(seconds: str) -> None:
    from megatron_efr.policy import Policy

    build = Policy.__init__

    def hooked(self: Policy, *arguments: Any, **named: Any) -> None:
        threading.Timer(float(seconds), die).start()
        build(self, *arguments, **named)

    Policy.__init__ = hooked


def at_working(seconds: str) -> None:
    from megatron_efr.run import owner

    owned = owner.owned

    def hooked(lock: Path, what: str) -> Any:
        threading.Timer(float(seconds), die).start()
        return owned(lock, what)

    owner.owned = hooked


MOMENTS: dict[str, Callable[..., None]] = {
    "rollout": at_rollout,
    "answer": at_answer,
    "servers": at_servers,
    "update": at_update,
    "stuck": at_stuck,
    "logged": at_logged,
    "save": at_save,
    "background": at_background,
    "renamed": at_renamed,
    "seconds": at_seconds,
    "working": at_working,
}


def main() -> None:
    kind, *details = sys.argv[1].split(":")
    MOMENTS[kind](*details)
    importlib.import_module(f"megatron_efr.{sys.argv[2]}").main(sys.argv[3:])
    if kind != "servers":
        threading.Event().wait(800)  # for a kill that the program was too fast for


if __name__ == "__main__":
    main()
