"""The wheel and the source distribution: what they hold, and that programs run from an unpacked
wheel in any folder.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from megatron_efr import __version__
from megatron_efr.cli import PROGRAMS

pytestmark = [pytest.mark.alike, pytest.mark.heavy]

ROOT = Path(__file__).parents[2]
BUILD = (
    "import setuptools.build_meta as backend; backend.build_wheel('dist'), "
    "backend.build_sdist('dist')"
)
NOT_SOURCE = (
    "*.egg-info",
    "__pycache__",
    ".venv*",
    ".git",
    "runs",
    "build",
    "dist",
    "site",
    ".*_cache",
    ".hypothesis",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, in which the build backend may leave its files; `dist/` holds what
    it built.
    """
    copy = tmp_path_factory.mktemp("source") / "megatron_efr"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True)
    return copy


@pytest.fixture(scope="module")
def unpacked(source: Path) -> Path:
    """The wheel's files, as an installer lays them down."""
    [wheel] = (source / "dist").glob("*.whl")
    place = source.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    return place


def program(unpacked: Path, *words: str, folder: Path) -> str:
    """Output of the unpacked wheel's `efr WORDS` in `folder`, the checkout out of sight."""
    entry = configparser.ConfigParser()
    entry.read(next(unpacked.glob("*.dist-info")) / "entry_points.txt")
    module, function = entry["console_scripts"]["efr"].split(":")
    script = (
        f"import sys, {module} as m; assert m.__file__.startswith({str(unpacked)!r}); "
        f"sys.exit(m.{function}())"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "COLUMNS": "120"}
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path) -> set[str]:
    """The package's files: modules, templates, style sheets; no byte code."""
    found = (
        path
        for path in (folder / "megatron_efr").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    )
    return {path.relative_to(folder).as_posix() for path in found}


def test_the_wheel_holds_the_package_whole_and_nothing_else(source: Path, unpacked: Path) -> None:
    assert files(unpacked) == files(source)
    assert {path.name.partition("-")[0] for path in unpacked.iterdir()} == {"megatron_efr"}


def test_the_source_distribution_holds_what_tests_and_launch_scripts_need(source: Path) -> None:
    [archive] = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    for folder in ("docs", "examples", "findings", "launch", "megatron_efr", "tests", "tools"):
        assert {
            str(path.relative_to(source)) for path in (source / folder).rglob("*") if path.is_file()
        } <= held


def test_programs_run_from_any_folder(unpacked: Path, tmp_path: Path) -> None:
    assert program(unpacked, "--version", folder=tmp_path) == f"{__version__}\n"
    shown = program(unpacked, "--help", folder=tmp_path)
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in PROGRAMS)


def test_a_report_is_written_from_any_folder(unpacked: Path, tmp_path: Path) -> None:
    run = tmp_path / "elsewhere/runs/mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: mine\n")
    steps = [
        {"step": step, "accuracy": step / 10, "tokens_mean": 50.0 - step} for step in range(1, 9)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    printed = program(unpacked, "report", "runs/mine", folder=run.parents[1])
    assert printed.endswith("report: runs/mine/report/index.html\n")
    page = (run / "report/index.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert (ROOT / "megatron_efr/report/report.css").read_text(encoding="utf-8").splitlines()[
        0
    ] in page


def test_the_version_stands_in_one_place_and_the_changelog_begins_with_its_note(
    unpacked: Path,
) -> None:
    metadata = (next(unpacked.glob("*.dist-info")) / "METADATA").read_text(encoding="utf-8")
    assert f"\nVersion: {__version__}\n" in metadata
    assert (
        re.findall(
            r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
        )[0]
        == __version__
    )
    assert (
        yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
        == __version__
    )


@pytest.mark.slow
def test_both_install_into_a_clean_environment_and_work_there(source: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    place = tmp_path / "venv/bin"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    responses = tmp_path / "responses.jsonl"
    responses.write_text(json.dumps({"response": "so \\boxed{1/2}", "answer": "0.5"}) + "\n")

    def run(*words: str | Path) -> str:
        command = [place / words[0], *words[1:]]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for kind, flags in (
        ("*.whl", ["-c", ROOT / "launch/constraints.txt"]),
        ("*.tar.gz", ["--force-reinstall", "--no-deps"]),
    ):
        [distribution] = (source / "dist").glob(kind)
        run("python", "-m", "pip", "install", "--quiet", *flags, distribution)
        run("python", "-m", "pip", "check")
        assert run("efr", "--version") == f"{__version__}\n"
        assert run("efr", "train", "--help").startswith("usage: efr train")
        assert json.loads(run("efr", "grade", responses, "--json"))["totals"] == {
            "math": {"correct": 1}
        }
