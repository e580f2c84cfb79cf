"""`efr plan` on a CPU: what it counts, and what it makes of the seconds that it measures."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.optimize import brentq

from megatron_efr.config import ConfigError, ModelConfig, TrainConfig
from megatron_efr.memory import kv_bytes_per_token, parameter_count
from megatron_efr.planning import host, probe
from megatron_efr.planning.__main__ import main, on_cpu
from megatron_efr.planning.lengths import geometric, rows_of_steps
from megatron_efr.planning.probe import Seconds, Work, measured
from megatron_efr.planning.shapes import shape_of

MODEL = "models/SmolLM2-135M-Instruct"


def config(**rollout: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "name": "plan",
        "model": {"path": MODEL},
        "data": {"datasets": [{"path": "none"}]},
    }
    tree |= {"rollout": {"prompts": 8, "samples": 8, "slots": 40, "max_new_tokens": 128} | rollout}
    tree |= {"algorithm": {"beta": 0.0}, "optimizer": {"lr": 1e-5}}
    tree |= {"train": {"iterations": 10, "updates": 2, "micro_batch_tokens": 1000}}
    return TrainConfig.model_validate(tree)


def test_each_further_layer_adds_what_it_does_beside_few_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []

    def seconds(raw: dict[str, Any], model: ModelConfig, work: Work) -> Seconds:
        depth, vocab = raw["num_hidden_layers"], raw["vocab_size"]
        asked.append((depth, vocab))
        # a layer takes half a second, a token of the vocabulary a millisecond
        return Seconds(*(number + 0.5 * depth + 1e-3 * vocab for number in range(6)))

    monkeypatch.setattr(probe, "_seconds", seconds)
    found = measured(shape_of(MODEL), ModelConfig(path=MODEL), Work(1, 1, 1, 1, 0, 1))
    assert asked == [(1, 49152), (1, 256), (5, 256)]
    assert found == pytest.approx([number + 0.5 * 30 + 49.152 for number in range(6)])


def test_an_iteration_is_the_sum_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Work] = []
    seconds = Seconds(prefill=0.5, few=0.1, full=0.3, score=0.25, train=1.0, update=3.0)
    monkeypatch.setattr(host, "measured", lambda raw, model, work: asked.append(work) or seconds)
    # 40 of 64 rows end together, and the 24 others after them
    found = host.HostPlan(config(max_new_tokens=100), 56, 100).seconds()
    assert asked == [Work(groups=5, samples=8, prompt=56, response=100, beyond=0, budget=1000)]
    assert found == pytest.approx(
        {
            "rollout": 8 * 0.5 + 99 * 0.3 + 99 * (0.1 + 0.2 * (24 - 8) / (40 - 8)),
            "logprobs": 64 * 0.25,
            "train": 64 * 1.0 + 2 * 3.0,
        }
    )


def test_half_of_a_long_response_is_as_far_as_the_timed_one_and_what_is_beyond(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = host.HostPlan(config(max_new_tokens=4000), 56, 2000)
    asked: list[Work] = []
    seconds = Seconds(0.5, 0.1, 0.3, 0.25, 1.0, 3.0)
    monkeypatch.setattr(host, "measured", lambda raw, model, work: asked.append(work) or seconds)
    plan.seconds()
    assert asked[0].response // 2 + asked[0].beyond == 2000 // 2


def test_a_step_grows_with_what_is_known_beyond_the_timed_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    class Engine:
        """A step takes a second, and a hundredth for each token of the prompt."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def publish(self, *_: object) -> None: ...

        def generate(self, asked: list[Any], sampling: Any) -> list[Any]:
            known = len(asked[0].prompt.tokens)
            now[0] += (sampling.max_new_tokens - 1) * (1 + 0.01 * known)
            return []

    monkeypatch.setattr(probe, "LocalEngine", Engine)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    (tmp_path / "config.json").write_text(json.dumps(shape_of(MODEL)))
    work = Work(groups=2, samples=4, prompt=100, response=512, beyond=744, budget=1000)
    _, few, full = probe._engine(ModelConfig(path=str(tmp_path)), work)
    assert (few, full) == pytest.approx((12.0, 12.0))  # 1 + 0.01 * (100 + 1000)


@pytest.mark.parametrize(("mean", "most"), [(1, 9), (38, 128), (128, 128), (58, 4000)])
def test_lengths_are_geometric_with_the_mean_that_was_given(mean: int, most: int) -> None:
    found = geometric(mean, most, 4000)
    assert found.mean() == pytest.approx(mean, rel=2e-3)
    # drawn token by token, with the probability that has this mean
    going_on = brentq(lambda p: sum(p**k for k in range(most)) - mean, 0, 1)
    drawn = np.random.default_rng(1).random((4000, most)) >= going_on
    ends = np.where(drawn.any(1), drawn.argmax(1) + 1, most)
    for part in (25, 50, 75, 95):
        expected = np.percentile(ends, part)
        assert np.percentile(found, part) == pytest.approx(expected, rel=0.1, abs=1)


def test_a_row_that_ends_is_filled_and_the_longest_responses_are_left() -> None:
    # the third begins as the second ends, the fourth as the first and the third do
    assert rows_of_steps(np.array([3, 1, 2, 5]), 2).tolist() == [2, 2, 2, 1, 1, 1, 1, 1]
    lengths = geometric(58, 200, 256)
    rows = rows_of_steps(lengths, 64)
    assert rows.sum() == lengths.sum()
    assert rows.max() == rows[0] == 64
    assert rows_of_steps(lengths, 256).tolist() == [
        int((lengths > step).sum()) for step in range(lengths.max())
    ]
    assert rows_of_steps(np.zeros(3, np.int64), 2).tolist() == []


@pytest.mark.parametrize(("vectors", "rows"), [("AVX2", 40), ("AVX512", 64)])
def test_memory_is_counted_by_part(
    vectors: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    plan = host.HostPlan(config(), 56, 100)
    count, memory = parameter_count(plan.architecture), plan.memory()
    assert count == 134_515_008
    for phase in memory.values():
        assert (phase["weights"], phase["gradients"], phase["optimizer"]) == (
            4 * count,
            4 * count,
            8 * count,
        )
        # a packed head is another copy of the embedding that it is tied to
        assert phase["engine"] == 4 * (count + (49152 * 576 if vectors == "AVX2" else 0))
    # 40 rows in blocks of 8 or 32, and the prompts of 5 groups that fill them and of one begun,
    # not of all 8
    assert memory["rollout"]["KV cache"] == (rows * 192 + 6 * 56) * kv_bytes_per_token(
        plan.architecture, 1, "float32"
    )
    assert memory["train"]["head"] == 4 * 1000 * 49152 + 2 * 1000 * 576 * 4
    assert host.HostPlan(config(), 56, 100).budget == 1000
    assert host.fits(plan)
    monkeypatch.setattr(host, "host_bytes", lambda: 2**31)
    assert not host.fits(plan)


def test_what_a_cpu_does_not_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.engine: sglang is not planned on a CPU"):
        host.HostPlan(config(engine="sglang", slots=8), 56, 100)


def test_lengths_that_the_run_or_the_model_does_not_allow_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^--tokens 129: rollout\.max_new_tokens cuts a response off at 128$"
    ):
        host.HostPlan(config(), 56, 129)
    with pytest.raises(
        ConfigError, match=r"^rollout\.max_new_tokens: 8137 .* come to 8193, and the model has 8192"
    ):
        host.HostPlan(config(max_new_tokens=8137), 56, 100)
    assert host.HostPlan(config(max_new_tokens=8136), 56, 100).tokens == 100


def test_what_does_not_fit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "host_bytes", lambda: 2**31)
    monkeypatch.setattr(
        host, "measured", lambda *_: pytest.fail("a model of the same width may not fit either")
    )
    out = io.StringIO()
    assert not on_cpu(host.HostPlan(config(), 56, 100), Console(file=out, width=160))
    assert "It does not fit." in out.getvalue()


def test_measuring_does_not_change_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, plan = [2**28], host.HostPlan(config(), 56, 100)
    monkeypatch.setattr(host, "resident_bytes", lambda: resident[0])

    def measured(*_: object) -> Seconds:
        resident[0] = 2**50  # what the measured models leave behind
        return Seconds(0.5, 0.1, 0.3, 0.25, 1.0, 3.0)

    monkeypatch.setattr(host, "host_bytes", lambda: 2**40)
    monkeypatch.setattr(host, "measured", measured)
    out = io.StringIO()
    assert on_cpu(plan, Console(file=out, width=160))
    assert "an iteration: about " in out.getvalue()
    assert "It does not fit" not in out.getvalue()


@pytest.mark.parametrize(
    ("flag", "text", "limits"),
    [
        ("--nodes", "0", "0: at least 1"),
        ("--gpus", "-8", "-8: at least 0"),
        ("--prompt", "-5", "-5: at least 1"),
        ("--tokens", "0", "0: at least 1"),
        ("--memory-gib", "nan", "nan: at least 1"),
        ("--nodes", "two", "invalid int value: 'two'"),
    ],
)
def test_numbers_that_make_no_plan_are_refused_by_flag(
    flag: str, text: str, limits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["a.yaml", f"{flag}={text}"])
    assert f"error: argument {flag}: {limits}\n" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_model_is_measured_and_the_iteration_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61,'
        '"num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 512}'
    )
    command = [
        sys.executable,
        "-m",
        "megatron_efr.cli",
        "plan",
        "examples/quickstart/rl.yaml",
        "--tokens",
        "40",
    ]
    root = Path(__file__).parents[3]
    # a process of its own, since Megatron's groups are a process's, and other tests hold some
    done = subprocess.run(
        [*command, f"model.path={tmp_path}/config.json"], cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "an iteration: about " in done.stdout
