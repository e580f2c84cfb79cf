"""Starts a module of the tests on several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(processes: int, module: str, *arguments: object, path: Path | None = None, check: bool = True) -> None:
    """Run `python -m MODULE ARGUMENTS...` on every rank, one thread each, with `path` before the others to import from.

    AssertionError has the end of what the ranks said, unless they may fail (`check` false).
    """
    paths = [*([str(path)] if path else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, "-m", module, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stderr[-6000:]
