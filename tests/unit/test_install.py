"""The installation of a CUDA machine: what it would run, and that its pins agree with the package's
own ranges.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CONSTRAINTS = (ROOT / "launch/constraints.txt").read_text().splitlines()
PINS: dict[str, list[Requirement]] = {}
for _line in CONSTRAINTS:
    PINS.setdefault(Requirement(_line).name, []).append(Requirement(_line))
PYTHONS = ("3.11", "3.12", "3.13")
PARTS = {
    "--no-te": "transformer-engine[core_cu13,pytorch]",
    "--no-flash-attn": "flash-attn",
    "--no-apex": "apex",
    "--no-sglang": str(PINS["sglang"][0]),
}


def dry_run(*flags: str) -> list[list[str]]:
    """The commands that the installation would run, each as its words."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch/install_h100.sh"), "--dry-run", *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert all(line.startswith("+ ") for line in lines)
    return [shlex.split(line[2:]) for line in lines]


def installed(commands: list[list[str]]) -> set[str]:
    """Everything that some command asks pip for."""
    return {
        word
        for words in commands
        if "install" in words
        for word in words[words.index("install") + 1 :]
    }


def test_each_part_is_installed_unless_its_flag_leaves_it_out() -> None:
    everything = installed(dry_run())
    assert set(PARTS.values()) <= everything
    for flag, part in PARTS.items():
        assert everything - installed(dry_run(flag)) >= {part}
        assert set(PARTS.values()) - installed(dry_run(flag)) == {part}


def test_what_is_compiled_sees_the_installed_torch_and_the_pins() -> None:
    for words in dry_run():
        if set(words) & {"apex", "flash-attn", "transformer-engine[core_cu13,pytorch]"}:
            assert "--no-build-isolation" in words
            assert words[words.index("--constraint") + 1] == "launch/constraints.txt"


def test_apex_comes_from_nvidia_at_a_commit_and_never_from_the_package_index() -> None:
    [apex] = [Requirement(line) for line in CONSTRAINTS if line.startswith("apex")]
    assert apex.url is not None
    place, commit = apex.url.rsplit("@", 1)
    assert place == "git+https://github.com/NVIDIA/apex"
    assert len(commit) == 40


def test_the_engines_packages_never_reach_the_trainers_interpreter() -> None:
    for words in dry_run():
        if any(word.startswith("sglang") for word in words):
            assert words[0] == ".venv-sglang/bin/python"
            assert "--constraint" not in words  # the trainer's pins, another torch among them


PYTHON = """#!/bin/sh
echo "$0 $*" >> log
case "$*" in *" {broken}"*) echo "no kernel image" >&2; exit 1 ;; *nvidia-nccl-cu13*) echo 2.99 ;; esac
"""


@pytest.mark.parametrize("broken", ["transformer-engine[core_cu13,pytorch]", "flash-attn", "apex"])
def test_a_compiled_part_that_fails_keeps_nothing_else_away_and_is_named_at_the_end(
    broken: str, tmp_path: Path
) -> None:
    """The script itself, with interpreters that note what they are asked."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch/setup.sh").write_text("")
    for place in (".venv/bin/python", ".venv/bin/efr", ".venv-sglang/bin/python"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(PYTHON.format(broken=broken))
        (tmp_path / place).chmod(0o755)
    done = subprocess.run(
        ["bash", str(tmp_path / "launch/install_h100.sh")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    [said] = [line for line in done.stderr.splitlines() if line.startswith("install: ")]
    names = {"flash-attn": "flash attention (", "apex": "apex ("}
    assert said.startswith(
        f"install: failed, as said above: {names.get(broken, 'Transformer Engine (')}"
    )
    log = (tmp_path / "log").read_text().splitlines()
    assert all(any(part in line for line in log) for part in PARTS.values())
    assert log[-2:] == [
        ".venv/bin/python -m pip install --no-deps nvidia-nccl-cu13==2.99",
        ".venv/bin/efr doctor",
    ]


def test_a_wrong_flag_is_refused_with_the_usage() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "launch/install_h100.sh"), "--no-tea"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--no-te --no-flash-attn --no-apex --no-sglang" in done.stdout


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_are_within_the_packages_own_ranges(python: str) -> None:
    """Every requirement has one pin for each Python, and some range of it holds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert python in SpecifierSet(project["requires-python"])
    asked = [
        *project["dependencies"],
        *(line for e in ("gpu", "sglang", "dev") for line in project["optional-dependencies"][e]),
    ]
    pins = {canonicalize_name(name): lines for name, lines in PINS.items()}
    met = set()
    for requirement in map(Requirement, asked):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            [pin] = [
                p
                for p in pins[name]
                if p.marker is None or p.marker.evaluate({"python_version": python})
            ]
            assert requirement.specifier.contains(next(iter(pin.specifier)).version), (
                requirement,
                pin,
            )
            met.add(name)
    assert {"torch", "megatron-core", "transformer-engine", "sglang", "ruff"} <= met


def test_a_machine_has_one_pin_of_each_package_for_each_python() -> None:
    for pins in PINS.values():
        for python in PYTHONS:
            assert (
                len(
                    [
                        p
                        for p in pins
                        if p.marker is None or p.marker.evaluate({"python_version": python})
                    ]
                )
                == 1
            ), pins


def find_python(
    place: Path,
    *found: str,
    pyenv: tuple[str, ...] = (),
    tools: tuple[str, ...] = (),
    **environment: str,
) -> tuple[str, str]:
    """(interpreter, why) that launch/python.sh finds with these on its path, or (what it says,
    "").
    """
    shutil.rmtree(place, ignore_errors=True)
    paths = [place / "bin" / f"python{version}" for version in found]
    paths += [place / f"pyenv/versions/{version}/bin/python" for version in pyenv]
    for path, version in zip(paths, (*found, *pyenv), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        minor = ".".join(version.split(".")[:2])
        path.write_text(
            f'#!/bin/sh\nfor asked in "$@"; do [ "$asked" = {minor} ] && exit 0; done; exit 1\n'
        )
        path.chmod(0o755)
    (place / "bin").mkdir(parents=True, exist_ok=True)
    for tool in tools:
        (place / "bin" / tool).symlink_to("/bin/true")
    (place / "bin/sort").symlink_to(str(shutil.which("sort")))
    script = f'. {ROOT}/launch/python.sh; cd {place}; find_python .venv; echo "$python|$why"'
    environment |= {"PATH": str(place / "bin"), "PYENV_ROOT": str(place / "pyenv")}
    done = subprocess.run(
        [str(shutil.which("bash")), "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == bool(done.stderr), done.stderr
    return (done.stderr, "") if done.stderr else tuple(done.stdout.strip().split("|"))  # type: ignore[return-value]


def test_an_interpreter_is_found_on_the_path_or_among_pyenvs_and_says_why(tmp_path: Path) -> None:
    place = tmp_path / "machine"
    path, why = find_python(place, "3.12", pyenv=("3.11.7", "3.11.10", "3.10.1", "3.13.0"))
    assert (path, why.split(";")[0]) == (
        f"{place}/pyenv/versions/3.11.10/bin/python", "the smallest installation of 3.11, 3.12, "
            "3.13 that are here"
    )  # fmt: skip
    path, why = find_python(place, "3.11", pyenv=("3.13.0",), tools=("nvidia-smi",))
    assert (path, why.split(";")[0]) == (
        f"{place}/pyenv/versions/3.13.0/bin/python", "there is a GPU, and 3.12 has the "
            "newer Megatron-Core"
    )  # fmt: skip
    assert find_python(place, "3.12", "3.13")[0] == f"{place}/bin/python3.12"
    assert find_python(place, "3.11", "3.13", PYTHON="python3.13") == (
        "python3.13",
        "PYTHON names it",
    )
    said, _ = find_python(place, "3.11", "3.10", PYTHON="python3.10")
    assert "PYTHON=python3.10: is no Python 3.11, 3.12 or 3.13" in said
    said, _ = find_python(place, "3.10", pyenv=("3.14.0",))
    assert "no Python 3.11, 3.12 or 3.13" in said
    assert "PYTHON=/path/to/python" in said


@pytest.mark.parametrize(
    "script", sorted((ROOT / "launch").glob("*.s*")), ids=lambda path: path.name
)
def test_every_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
