"""SGLang's interpreter beside the trainer's, what the two must have in common to exchange weights,
and its servers.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import torch
from torch.cuda import nccl

from megatron_efr.addresses import KEY, status
from megatron_efr.doctor.finding import Finding, missing
from megatron_efr.doctor.packages import last_line

LIMIT_S = 300
ANSWER_S = 5.0  # for a server that runs already

# Runs in the other interpreter; sglang itself is not imported, which takes a minute and on some
# machines a GPU.
_PROBE = """
import importlib.metadata as metadata, json, torch
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
print(json.dumps({
    "sglang": version("sglang"), "torch": torch.__version__, "cuda": torch.version.cuda,
    "nccl": list(nccl) if nccl else None, "saver": version("torch_memory_saver"),
}))
"""

_ROUTER_PROBE = """
import importlib.metadata as metadata
import sglang_router.launch_router
print(metadata.version("sglang-router"))
"""


class Versions(TypedDict):
    """An interpreter's answer to the probe; `nccl` is known if there is a GPU."""

    sglang: str | None
    torch: str
    cuda: str | None
    nccl: list[int | str] | None
    saver: str | None


def check_engine(python: str, pin: str | None, needed: bool) -> Iterator[Finding]:
    """SGLang in the interpreter `python`; `pin` is the version that it should be."""
    install = (
        "bash launch/install_h100.sh (on a machine without a GPU: bash tools/setup_sglang_cpu.sh)"
    )
    # SGLang has an interpreter, and a torch, of its own
    if not Path(python).exists():
        yield missing(
            "SGLang",
            f"{python}: no such interpreter",
            f"{install}; the embedded engine needs none",
            needed,
        )
        return
    done = subprocess.run(
        [python, "-c", _PROBE], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        yield missing("SGLang", f"{python}: {last_line(done.stderr)}", install, needed)
        return
    # the last line: what is imported may have printed others
    theirs: Versions = json.loads(done.stdout.splitlines()[-1])
    if theirs["sglang"] is None:
        yield missing(
            "SGLang", f"{python}: has torch {theirs['torch']}, and no sglang", install, needed
        )
        return
    # another version may serve, and yet take no weights
    if pin is not None and theirs["sglang"] != pin:
        advice = f"its update endpoints differ between versions: {install}"
        yield missing(
            "SGLang",
            f"{theirs['sglang']}, and megatron_efr needs {pin}",
            advice,
            needed,
        )
    else:
        yield Finding("SGLang", "ok", f"{theirs['sglang']} on torch {theirs['torch']} in {python}")
    # weights cross between the two interpreters
    yield from compare(theirs, own_versions(), needed)


def check_router(python: str, pin: str | None) -> Finding:
    """sglang-router in the interpreter `python`, for a run that asks for it; `pin` is the version
    that it should be.
    """
    subject = "sglang-router"
    wanted = f"sglang-router=={pin}" if pin else "sglang-router"
    advice = f"{python} -m pip install --no-deps {wanted}, or leave rollout.router out"
    if not Path(python).exists():
        return Finding(subject, "problem", f"{python}: no such interpreter", advice)
    done = subprocess.run(
        [python, "-c", _ROUTER_PROBE], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        return Finding(subject, "problem", f"{python}: {last_line(done.stderr)}", advice)
    version = last_line(done.stdout)
    if pin is not None and version != pin:
        return Finding(subject, "problem", f"{version}, and megatron_efr needs {pin}", advice)
    return Finding(subject, "ok", f"{version} in {python}")


def check_servers(urls: Sequence[str], key: str | None) -> Iterator[Finding]:
    """Ask servers that run already if they answer, and to this key.

    /server_info asks a server's scheduler, be it paused, and wants the key; /health and /ready let
    everyone in.
    """
    with ThreadPoolExecutor(max(1, len(urls))) as pool:
        codes = list(
            pool.map(lambda url: status(f"{url.rstrip('/')}/server_info", ANSWER_S, key), urls)
        )
    for url, code in zip(urls, codes, strict=True):
        if code == 200:
            yield Finding("engine", "ok", f"{url} answers")
        elif code in (401, 403):
            said = (
                f"{url} refuses the key in {KEY}"
                if key
                else f"{url} requires a key, and {KEY} is not set"
            )
            yield Finding(
                "engine",
                "problem",
                said,
                f"export {KEY}=KEY, with which the server was started (--api-key)",
            )
        else:
            said = f"no answer within {ANSWER_S:g} s" if code is None else f"answers {code}"
            advice = "start it there (launch/serve_engines.sh), or correct rollout.urls"
            yield Finding("engine", "problem", f"{url}: {said}", advice)


def own_versions() -> Versions:
    """This interpreter's answer to the same questions."""
    version = list(nccl.version()) if torch.cuda.is_available() else None
    return {
        "sglang": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": version,
        "saver": None,
    }


def compare(engine: Versions, trainer: Versions, needed: bool) -> Iterator[Finding]:
    """Check that weights can pass between two interpreters: by CUDA IPC (one driver), by NCCL (one
    version).
    """
    # CUDA IPC: one driver opens the memory of both
    theirs, ours = engine["cuda"], trainer["cuda"]
    if (theirs is None) != (ours is None):
        seen = f"trainer: {ours or 'a CPU build'}, engine: {theirs or 'a CPU build'}"
        yield missing("CUDA of both", seen, "install both for the same kind of machine", needed)
    elif theirs is not None and ours is not None:
        same = theirs.split(".")[0] == ours.split(".")[0]
        advice = "" if same else "one major version for both, so that one driver serves them"
        yield Finding(
            "CUDA of both", "ok" if same else "note", f"trainer {ours}, engine {theirs}", advice
        )
    # NCCL: trainer and engine are members of one group
    if engine["nccl"] and trainer["nccl"]:
        seen = f"trainer {_dotted(trainer['nccl'])}, engine {_dotted(engine['nccl'])}"
        if engine["nccl"] == trainer["nccl"]:
            yield Finding("NCCL of both", "ok", seen)
        else:
            advice = (
                "NCCL lets no two versions into one group, so the distributed transport would "
                "fail: in .venv, pip install --no-deps "
                f"nvidia-nccl-cu13=={_dotted(engine['nccl'])}"
            )
            yield missing("NCCL of both", seen, advice, needed)
    # colocated: a sleeping engine gives its memory to the trainer
    if theirs is not None and engine["saver"] is None:
        advice = (
            "without it a released engine frees nothing, and colocated training runs out of memory"
        )
        yield missing(
            "torch_memory_saver",
            f"not in the engine's interpreter: {advice}",
            "pip install it there",
            needed,
        )


def _dotted(version: list[int | str]) -> str:
    return ".".join(map(str, version))
