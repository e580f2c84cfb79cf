"""`efr doctor` in constructed situations: foreign and half-built packages, other interpreters,
ports, disks.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from megatron_efr.config import ConfigError, EvaluateConfig, RunConfig, SftConfig, TrainConfig
from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.data.byte_model import BYTE_MODEL, byte_tokenizer
from megatron_efr.data.model_folder import write_model_folder
from megatron_efr.doctor import machine, packages
from megatron_efr.doctor.__main__ import examine, fits_host
from megatron_efr.doctor.engine import Versions, check_engine, check_router, compare
from megatron_efr.doctor.finding import Finding
from megatron_efr.doctor.model import check_data, check_prompt, check_weights
from megatron_efr.doctor.packages import check_apex, check_packages, check_version, requirements
from megatron_efr.doctor.programs import load_any
from megatron_efr.weights.architecture import Architecture

ROOT = Path(__file__).parents[3]


def distribution(folder: Path, name: str, number: str) -> None:
    """Files that pip leaves behind of an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")


def package(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")


def interpreter(folder: Path, *lines: str) -> str:
    """An interpreter of this machine's Python whose site-packages are `folder` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, line in zip(("torch.py",), lines, strict=False):
        (folder / name).write_text(line)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return str(path)


TORCH = """
__version__ = "2.14.1+cu130"
class version: cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: True)
    class nccl: version = staticmethod(lambda: (2, 30, 7))
"""


# -- packages
# --------------------------------------------------------------------------------------------------


def test_the_apex_of_the_package_index_is_told_from_nvidias(tmp_path: Path) -> None:
    distribution(tmp_path, "apex", "0.9.10.dev0")
    package(tmp_path, "apex", "apex/lib")
    found = check_apex([str(tmp_path)])
    assert found.verdict == "problem"
    assert "0.9.10.dev0" in found.found
    assert str(tmp_path / "apex") in found.found
    assert "pip uninstall apex" in found.advice


def test_nvidias_apex_is_ok_only_with_its_extensions(tmp_path: Path) -> None:
    assert check_apex([str(tmp_path)]).verdict == "note"
    distribution(tmp_path, "apex", "0.1")
    package(tmp_path, "apex", "apex/multi_tensor_apply", "apex/optimizers")
    bare = check_apex([str(tmp_path)])
    assert bare.verdict == "problem"
    assert "APEX_CUDA_EXT=1" in bare.advice
    (tmp_path / "amp_C.py").write_text("")
    assert check_apex([str(tmp_path)]) == Finding(
        "NVIDIA apex", "ok", "0.1, with its CUDA extensions"
    )


def test_versions_are_held_to_the_ranges_of_the_installed_package(tmp_path: Path) -> None:
    found = {finding.subject: finding for finding in check_packages()}
    assert {finding.verdict for finding in found.values()} == {"ok"}
    pin = "0.16.1" if sys.version_info < (3, 12) else "0.19.2"
    assert found["megatron-core"].found == version("megatron-core") == pin
    [pinned] = [
        requirement for requirement in requirements() if requirement.name == "megatron-core"
    ]
    distribution(tmp_path, "megatron-core", "0.15.0")
    old = check_version(pinned, [str(tmp_path)])
    assert old.verdict == "problem"
    assert "0.15.0" in old.found
    assert f"=={pin}" in old.found
    absent = check_version(Requirement("no-such-thing>=1"), [str(tmp_path)], needed=False)
    assert (absent.verdict, absent.found) == ("note", "not installed")


def test_an_installed_package_says_where_the_scripts_are_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "launch scripts" not in {finding.subject for finding in check_packages()}
    monkeypatch.setattr(packages, "REPOSITORY", tmp_path)
    [found] = [finding for finding in check_packages() if finding.subject == "launch scripts"]
    assert found.verdict == "note"
    assert "source distribution" in found.advice


# -- the engine's interpreter
# ------------------------------------------------------------------------------------------


def test_an_interpreter_without_sglang_is_a_problem_only_where_the_run_needs_it(
    tmp_path: Path,
) -> None:
    python = interpreter(tmp_path, TORCH)
    [found] = check_engine(python, "0.5.23", needed=True)
    assert found.verdict == "problem"
    assert "has torch 2.14.1+cu130, and no sglang" in found.found
    [found] = check_engine(python, "0.5.23", needed=False)
    assert found.verdict == "note"
    [found] = check_engine(str(tmp_path / "nowhere"), "0.5.23", needed=True)
    assert "no such interpreter" in found.found
    [found] = check_engine(interpreter(tmp_path / "bare"), "0.5.23", needed=True)
    assert "No module named 'torch'" in found.found


def test_an_engine_of_another_version_cuda_or_without_the_memory_saver_is_named(
    tmp_path: Path,
) -> None:
    python = interpreter(tmp_path, TORCH)
    distribution(tmp_path, "sglang", "0.5.9")
    found = {finding.subject: finding for finding in check_engine(python, "0.5.23", needed=True)}
    assert "0.5.9, and megatron_efr needs 0.5.23" in found["SGLang"].found
    assert found["CUDA of both"].verdict == ("problem" if torch.version.cuda is None else "ok")
    assert found["torch_memory_saver"].verdict == "problem"


def test_two_versions_of_nccl_are_a_problem_with_the_command_that_mends_it() -> None:
    ours: Versions = {
        "sglang": None,
        "torch": "2.13.0",
        "cuda": "13.0",
        "nccl": [2, 29, 7],
        "saver": None,
    }
    theirs: Versions = {
        "sglang": "0.5.23",
        "torch": "2.14.1",
        "cuda": "13.0",
        "nccl": [2, 30, 7],
        "saver": "0.0.10",
    }
    found = {finding.subject: finding for finding in compare(theirs, ours, needed=True)}
    assert found["CUDA of both"].verdict == "ok"
    assert found["NCCL of both"].verdict == "problem"
    assert "pip install --no-deps nvidia-nccl-cu13==2.30.7" in found["NCCL of both"].advice
    same: Versions = {**ours, "nccl": [2, 30, 7]}
    assert [finding.verdict for finding in compare(theirs, same, needed=True)] == ["ok", "ok"]


def test_a_router_that_is_missing_broken_or_of_another_version_comes_with_the_command_that_installs_it(
    tmp_path: Path,
) -> None:
    python = interpreter(tmp_path)
    found = [check_router(str(tmp_path / "nowhere"), "0.3.2"), check_router(python, "0.3.2")]
    package(tmp_path, "sglang_router")
    (tmp_path / "sglang_router/launch_router.py").write_text("")
    distribution(tmp_path, "sglang-router", "0.2.0")
    found.append(check_router(python, "0.3.2"))
    said = (
        "no such interpreter",
        "No module named 'sglang_router'",
        "0.2.0, and megatron_efr needs 0.3.2",
    )
    assert [s in f.found for s, f in zip(said, found, strict=True)] == [True] * 3, found
    assert {f.verdict for f in found} == {"problem"}
    assert f"{python} -m pip install --no-deps sglang-router==0.3.2" in found[2].advice
    assert check_router(python, "0.2.0").verdict == "ok"


# -- the machine
# --------------------------------------------------------------------------------------------------


def test_a_port_that_somebody_listens_on_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        found = machine.check_port(port, "torchrun's rendezvous", "127.0.0.1")
        assert found.verdict == "problem"
        assert f"sport = :{port}" in found.advice
    assert machine.check_port(port, "torchrun's rendezvous", "127.0.0.1").verdict == "ok"


def test_a_disk_too_small_is_found_even_for_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    folder = tmp_path / "a/b/c"
    assert machine.check_disk(folder, 1, "a run").verdict == "ok"
    full = machine.check_disk(folder, 2**60, "a run")
    assert full.verdict == "problem"
    assert f"GiB free at {tmp_path}, {2**30}.0 GiB for a run" in full.found
    assert not folder.exists()


def test_threads_and_shared_memory(tmp_path: Path) -> None:
    assert machine.check_threads({}, 8).verdict == "note"
    assert machine.check_threads({"OMP_NUM_THREADS": "1"}, 8).verdict == "ok"
    assert machine.check_threads({"OMP_NUM_THREADS": "64"}, 8).verdict == "note"
    assert machine.check_threads({"OMP_NUM_THREADS": "all"}, 8).verdict == "note"
    assert machine.check_shared_memory(True, tmp_path / "shm").verdict == "note"


def test_little_shared_memory_stops_a_run_and_no_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is built with the 64 MB that Docker gives, and ends with this program."""
    docker = SimpleNamespace(total=64 * 2**20)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: docker)
    assert machine.check_shared_memory(False, tmp_path).verdict == "note"
    found = machine.check_shared_memory(True, tmp_path)
    assert found.verdict == "problem"
    assert "has 0.06 GiB" in found.found


def test_nccl_settings_that_a_plain_torchrun_lacks_come_with_the_command_that_makes_them() -> None:
    lacking = machine.check_nccl_settings({"NCCL_CUMEM_ENABLE": "1"})
    assert lacking.verdict == "note"
    assert lacking.advice.endswith("export NCCL_NVLS_ENABLE=0")
    there = machine.check_nccl_settings({"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"})
    assert (there.verdict, there.found) == ("ok", "NCCL_CUMEM_ENABLE=0 NCCL_NVLS_ENABLE=0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu_it_says_what_runs() -> None:
    [found] = machine.check_gpus(needed=False)
    assert found.verdict == "note"
    assert "runs here: all programs" in found.advice
    assert "NCCL" in found.advice
    [found] = machine.check_gpus(needed=True)
    assert found.verdict == "problem"


# -- the program
# --------------------------------------------------------------------------------------------------


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "COLUMNS": "160"}
    command = [sys.executable, "-m", "megatron_efr.doctor", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


@pytest.mark.parametrize(
    ("file", "overrides", "kind"),
    [
        ("evaluate.yaml", [], EvaluateConfig),
        ("quickstart/sft.yaml", [], SftConfig),
        ("quickstart/rl.yaml", [], TrainConfig),
        ("paper_7b.yaml", ["data.prompt.system=Be brief."], TrainConfig),
    ],
)
def test_every_programs_configuration_is_known_by_its_sections(
    tied_model: Path, tmp_path: Path, file: str, overrides: list[str], kind: type[RunConfig]
) -> None:
    model = [f"model.path={tied_model}", "model.init=load", f"runs={tmp_path}"]
    config = load_any(str(ROOT / "examples" / file), [*overrides, *model])
    assert type(config) is kind
    found = {finding.subject: finding for finding in examine(config, [])}
    assert found["model"].verdict == "ok"
    assert f"qwen2 in {tied_model}" in found["model"].found
    assert ("checkpoints" in found["disk"].found) == (kind is not EvaluateConfig)


def test_a_configuration_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: [")
    for path in ("absent.yaml", "a.yaml"):
        with pytest.raises(ConfigError, match=path):
            load_any(str(tmp_path / path), [])


@pytest.mark.heavy
def test_the_exit_code_says_whether_this_run_could_start(tmp_path: Path) -> None:
    write(tmp_path, 0, ArithmeticTask(max_terms=3, train_rows=16, test_rows=8, sft_rows=16))
    rows = [
        f"{section}.datasets.0.path={tmp_path}/train.jsonl" for section in ("data", "evaluation")
    ]
    model = [f"model.path={tmp_path}/model", "model.init=random"]
    config = ["examples/quickstart/rl.yaml", f"runs={tmp_path}", *model, *rows]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    done = doctor(*config, "--port", str(port))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 problems" in done.stdout
    assert "Triton compiles" in done.stdout
    asked = [
        *config,
        "rollout.engine=sglang",
        f"rollout.python={tmp_path}/python",
        f"model.path={tmp_path}/absent",
    ]
    done = doctor(*asked, "observe.wandb=project", "--port", str(port))
    problems = re.findall(r"problem (\w+)", done.stdout)
    assert done.returncode == 1, done.stdout + done.stderr
    assert {"SGLang", "model"} <= set(problems), done.stdout
    assert f"{len(problems)} problems" in done.stdout


def test_bfloat16_runs_on_a_cpu_and_a_model_that_its_memory_does_not_hold_does_not(
    tied_model: Path, tmp_path: Path
) -> None:
    train = str(ROOT / "examples/quickstart/rl.yaml")
    for dtype in ("float32", "bfloat16"):
        small = load_any(train, [f"model.path={tied_model}", f"model.dtype={dtype}"])
        assert fits_host(small)
    shape = json.loads((tied_model / "config.json").read_text())
    # an embedding of 2^40 parameters: 2 TiB in bfloat16
    wide = shape | {"vocab_size": 2**20, "hidden_size": 2**20}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    for file in ("quickstart/rl.yaml", "evaluate.yaml"):
        huge = [f"model.path={tmp_path}", "model.dtype=bfloat16"]
        assert not fits_host(load_any(str(ROOT / "examples" / file), huge))


# -- the model, as the run will read it
# --------------------------------------------------------------------------------


def test_data_that_is_not_there_or_not_data_is_found_and_a_hubs_is_not_asked_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "Two and two?", "answer": "4"}\n')
    (tmp_path / "torn.jsonl").write_text('{"question": "Two and')

    def found(*paths: str) -> Finding:
        sets = ", ".join(f"{{path: {path}}}" for path in paths)
        overrides = [f"data.datasets=[{sets}]", "evaluation.datasets=[{path: openai/gsm8k}]"]
        train = load_any(str(ROOT / "examples/quickstart/rl.yaml"), overrides)
        return check_data(train)

    there = found(f"{tmp_path}/rows.jsonl")
    assert (there.verdict, there.found) == ("ok", f"{tmp_path}/rows.jsonl, openai/gsm8k")
    lacking = found("data/none.jsonl", f"{tmp_path}/rows.jsonl", f"{tmp_path}/torn.jsonl")
    assert lacking.verdict == "problem"
    assert lacking.found.startswith(
        f"data/none.jsonl: no such file or folder; {tmp_path}/torn.jsonl:1: "
    )
    for rows, verdict in (("rows", "ok"), ("torn", "problem"), ("none", "problem")):
        path = f"data.path={tmp_path}/{rows}.jsonl"
        sft = load_any(str(ROOT / "examples/quickstart/sft.yaml"), [path])
        assert check_data(sft).verdict == verdict
    # a run's answers, which no hub has
    dpo = load_any(str(ROOT / "examples/paper_dpo_7b.yaml"), ["data.path=none.jsonl.zst"])
    assert check_data(dpo).verdict == "problem"


def test_the_weights_are_opened_and_one_prompt_is_rendered(tmp_path: Path) -> None:
    folder, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    write_model_folder(folder, byte_tokenizer(), BYTE_MODEL)
    rows.write_text('{"question": "Two and two?", "answer": "4"}\n')
    tree = {
        "name": "a",
        "model": {"path": str(folder), "init": "random"},
        "data": {"datasets": [{"path": str(rows)}], "prompt": {"template": "{question}"}},
        "optimizer": {"lr": 1e-3},
    }
    config = TrainConfig.model_validate(tree)
    architecture = Architecture.from_folder(folder)
    prompt = check_prompt(config, architecture)
    assert (prompt.verdict, prompt.found) == (
        "ok",
        "15 tokens: '<bos><user>Two and two?<assistant>'",
    )
    assert check_weights(config.model, architecture, 0).verdict == "ok"
    missing = check_weights(config.model.model_copy(update={"init": "load"}), architecture, 0)
    assert missing.verdict == "problem"
    assert "neither model.safetensors nor" in missing.found
    (folder / "chat_template.jinja").write_text("{{ messages")
    broken = check_prompt(config, architecture)
    assert broken.verdict == "problem"
    assert f"{folder}: the chat template is no Jinja template: line 1" in broken.found
