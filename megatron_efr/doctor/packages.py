"""The trainer's interpreter: Python and packages against the ranges that the installed megatron-efr
itself states.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.metadata import distributions, metadata, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_efr.doctor.finding import Finding, missing

PACKAGE = "megatron-efr"
CORE = ("torch", "megatron-core", "triton", "transformers")
IMPORT_LIMIT_S = 300
# or the folder of packages, if this one is installed
REPOSITORY = Path(__file__).resolve().parents[2]
UNINSTALL = "pip uninstall transformer-engine transformer-engine-cu12 transformer-engine-cu13"

# Imports Transformer Engine in a process of its own: an import that fails half-way must not take
# the doctor with it.
_ENGINE_PROBE = """
import json
import torch  # its core looks for libraries that torch loads
import transformer_engine.pytorch
from transformer_engine.pytorch.attention.dot_product_attention import utils
flash = utils.FlashAttentionUtils
print(json.dumps([bool(flash.is_installed), bool(flash.v3_is_installed), str(flash.max_version)]))
"""


def check_packages() -> Iterator[Finding]:
    """Python, and the packages that everything stands on."""
    asked = SpecifierSet(str(metadata(PACKAGE)["Requires-Python"]))
    version = platform.python_version()
    if asked.contains(version):
        yield Finding("Python", "ok", f"{version} in {sys.prefix}")
    else:
        yield Finding(
            "Python",
            "problem",
            f"{version}, and {PACKAGE} asks for {asked}",
            "bash launch/setup.sh",
        )
    if not (REPOSITORY / "launch/setup.sh").is_file():
        advice = (
            "what is said here of launch/ and tools/ is done in the repository, or in the source "
            "distribution"
        )
        yield Finding("launch scripts", "note", "not in an installed package", advice)
    for requirement in requirements():
        if requirement.name in CORE:
            yield check_version(requirement)


def requirements() -> list[Requirement]:
    """Everything that the installed megatron-efr asks for under this Python, its extras
    included.
    """
    extras = ["", *(metadata(PACKAGE).get_all("Provides-Extra") or [])]
    asked = [Requirement(line) for line in requires(PACKAGE) or []]
    return [
        r
        for r in asked
        if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def check_version(
    requirement: Requirement, paths: Sequence[str] | None = None, needed: bool = True
) -> Finding:
    """The installed version of one package, looked for in `paths` (sys.path), against its range."""
    version = installed_version(requirement.name, paths)
    if version is None:
        return missing(requirement.name, "not installed", "bash launch/setup.sh", needed)
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(requirement.name, "ok", version)
    return missing(
        requirement.name,
        f"{version}, and {PACKAGE} asks for {requirement.specifier}",
        "bash launch/setup.sh",
        needed,
    )


def installed_version(name: str, paths: Sequence[str] | None = None) -> str | None:
    """The version of the distribution `name`, None if there is none."""
    found = next(
        iter(distributions(name=name, path=list(sys.path if paths is None else paths))), None
    )
    return None if found is None else found.version


def check_apex(paths: Sequence[str] | None = None) -> Finding:
    """NVIDIA's apex, which has `apex.multi_tensor_apply` and, compiled, `amp_C`; its namesake on
    the package index, a toolkit for web applications, has neither, and Megatron-Core takes any
    `apex` that imports for NVIDIA's.
    """
    # looked up without an import: nobody knows whose code it is
    paths = list(sys.path if paths is None else paths)
    spec = PathFinder.find_spec("apex", paths)
    if spec is None:
        advice = (
            "optional: Megatron uses torch's Adam and norms; bash launch/install_h100.sh builds "
            "it from source"
        )
        return Finding("NVIDIA apex", "note", "not installed", advice)
    # NVIDIA's is told from its namesake by a part that Megatron imports
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((place / "multi_tensor_apply").is_dir() for place in places):
        version = installed_version("apex", paths) or "of no distribution"
        return Finding(
            "NVIDIA apex",
            "problem",
            f"the package named apex ({version}, {places[0] if places else spec.origin}) is not "
            "NVIDIA's",
            "pip uninstall apex; NVIDIA's is built from source: bash launch/install_h100.sh",
        )
    # without its compiled part, the Adam that Megatron takes from it raises
    if PathFinder.find_spec("amp_C", paths) is None:
        advice = (
            "build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, as launch/install_h100.sh does, or "
            "remove it"
        )
        return Finding(
            "NVIDIA apex", "problem", "built without its CUDA extensions (no amp_C)", advice
        )
    return Finding(
        "NVIDIA apex", "ok", f"{installed_version('apex', paths)}, with its CUDA extensions"
    )


def check_transformer_engine(needed: bool) -> Iterator[Finding]:
    """Transformer Engine against its range, whether it imports, and which flash attention it would
    use.
    """
    [requirement] = [r for r in requirements() if r.name == "transformer-engine"]
    subject, install = "Transformer Engine", "bash launch/install_h100.sh"
    # absent: Megatron's local layers do
    there = installed_version(requirement.name) is not None
    if not there and PathFinder.find_spec("transformer_engine", sys.path) is None:
        advice = f"Megatron's local layers are used instead, at a lower speed; {install}"
        yield missing(subject, "not installed", install if needed else advice, needed)
        return
    # present in another version than pinned
    version = check_version(requirement, needed=needed) if there else None
    if version is not None and version.verdict != "ok":
        yield version
        return
    found = "of no distribution" if version is None else version.found
    # present, and imported in a process of its own: an import may crash
    done = subprocess.run(
        [sys.executable, "-c", _ENGINE_PROBE],
        capture_output=True,
        text=True,
        timeout=IMPORT_LIMIT_S,
        check=False,
    )
    if done.returncode:
        advice = (
            f"{install} builds its part for torch; or {UNINSTALL}: runs go on without it, and say "
            "so"
        )
        yield missing(
            subject, f"{found}, does not import: {last_line(done.stderr)}", advice, needed
        )
        return
    yield Finding(subject, "ok", found)
    # the flash attention that it would take
    second, third, newest = json.loads(done.stdout.splitlines()[-1])
    if second or third:
        yield Finding(
            "flash attention",
            "ok",
            f"version {'3' if third else '2'}, as Transformer Engine sees it",
        )
    else:
        flash = installed_version("flash-attn")
        seen = (
            "not installed"
            if flash is None
            else f"{flash}, which Transformer Engine does not take (up to {newest})"
        )
        yield Finding(
            "flash attention", "note", seen, f"cuDNN's attention is used instead; {install}"
        )


def last_line(text: str) -> str:
    """The message of an error, from its traceback."""
    return (text.strip().splitlines() or ["no message"])[-1]
