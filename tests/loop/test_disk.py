"""A run whose disk fills up ends with a sentence at whatever it was writing, loses nothing, and
goes on.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.loop.conftest import Program
from tests.loop.test_resume import assert_equal

SIZES = (4, 16, 400, 900, 1600, 2400, 3200)  # kB; the folder of the whole run has some megabytes


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", place], capture_output=True
    ).returncode:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_at_every_size_it_stops_at_and_goes_on_from_what_it_has(
    config: Path, whole: Path, program: Program, disk: Path
) -> None:
    """The files of this run grow to some megabytes: ever larger disks are full at ever later
    moments.
    """
    stopped = []
    for size in SIZES:
        subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        done = program(
            "train", "--resume", config, f"runs={disk}", "observe.tensorboard=true", expect=2
        )
        assert "Traceback" not in done.stderr
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        said = re.match(rf"error: {disk}/run/(\S+): cannot be written: .* bytes are free at ", line)
        assert said
        stopped.append(said[1])
    assert len(set(stopped)) >= 3, stopped
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    program("train", "--resume", config, f"runs={disk}")
    assert_equal(disk / "run", whole)
