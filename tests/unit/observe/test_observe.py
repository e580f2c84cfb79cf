"""Output of a run: metrics with timings kept apart, plain lines without a terminal, a watchdog on
what hangs.
"""

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from megatron_efr.config import ConfigError, ObserveConfig
from megatron_efr.log import duration
from megatron_efr.observe import EXIT_STUCK, Observer, Watchdog, deterministic
from megatron_efr.run.folder import RunFolder

QUIET = ObserveConfig(tensorboard=False)
METRICS = {
    "accuracy": 0.8125,
    "tokens_mean": 41.25,
    "reward_mean": 0.78,
    "kl": 0.00123,
    "grad_norm": 0.432,
    "time/tokens_per_s": 7912.0,
}


def test_phases_are_timed_summed_and_kept_apart_from_what_the_seed_decides(tmp_path):
    folder = RunFolder(tmp_path)
    with Observer(folder, QUIET, 2) as observer:
        for _ in range(2):
            with observer.phase("rollout"):
                time.sleep(0.02)
        with observer.phase("train"), observer.phase("inner"):
            time.sleep(0.01)
        assert observer.seconds("rollout") >= 0.04
        observer.log(1, METRICS)
        assert observer.seconds("rollout") == 0.0
        observer.log(2, METRICS)
    first, second = folder.read_metrics()
    assert first["time/rollout"] >= 0.04
    assert first["time/train"] >= first["time/inner"] >= 0.01
    assert first["time/total"] >= first["time/rollout"] + first["time/train"]
    assert 0 < first["time/memory_gib"] < 1000
    assert "time/rollout" not in second
    assert deterministic(first) == {"step": 1} | deterministic(METRICS)
    assert deterministic(first) | {"step": 2} == deterministic(second)


def test_a_phase_has_its_own_peak_memory_and_the_largest_of_all_ranks_is_written(tmp_path):
    def largest(figures):  # another rank has one GiB more, and entered a phase of its own
        return {name: gib + 1 for name, gib in figures.items()} | {"elsewhere_memory_gib": 7.0}

    with Observer(RunFolder(tmp_path), QUIET, 2, largest=largest) as observer:
        with observer.phase("outer"):
            with observer.phase("small"):
                pass
            with observer.phase("large"):
                held = bytearray(256 * 2**20)
                held[::4096] = b"x" * len(held[::4096])  # resident, not only promised
                del held
            with observer.phase("small"):
                pass
        first = observer.log(1, METRICS)
        second = observer.log(2, METRICS)
    small, large, outer = (
        first[f"time/{phase}_memory_gib"] for phase in ("small", "large", "outer")
    )
    assert 0.2 < large - small < 0.3, "what was freed before is not counted again"
    assert outer == large <= first["time/memory_gib"]
    assert first["time/elsewhere_memory_gib"] == 7.0
    assert "time/large_memory_gib" not in second
    assert second["time/memory_gib"] >= large, "the highest of the whole process"
    assert not any("memory_gib" in name for name in deterministic(first))


def test_without_a_terminal_each_step_is_one_aligned_line_without_control_codes(tmp_path, capsys):
    with Observer(RunFolder(tmp_path), QUIET, 100, start_step=7) as observer:
        observer.log(8, METRICS)
        observer.log(
            9,
            METRICS
            | {"accuracy": 1.0, "tokens_mean": 1234.5, "kl": -0.00002, "time/tokens_per_s": 99.0},
        )
        observer.log(100, METRICS)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(
        "  8/100  accuracy  81.2%  tokens    41.2  reward  0.780  KL  0.00123  grad  0.432"
    )
    assert "tok/s   7.9k" in lines[0]
    assert [lines[0].index(word) for word in ("KL", "grad", "left")] == [
        lines[1].index(word) for word in ("KL", "grad", "left")
    ]
    assert lines[2].endswith("done")


def test_time_left_follows_the_pace(tmp_path, capsys):
    with Observer(RunFolder(tmp_path), QUIET, 1000) as observer:
        time.sleep(0.1)
        observer.log(10, {"loss": 2.5})  # 0.01 s a step, 990 to go
    out = capsys.readouterr().out
    assert "loss   2.5000" in out
    left = re.search(r"left +(\d+)s", out)
    assert left
    assert 9 <= int(left[1]) <= 20


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with Observer(RunFolder(tmp_path / "run"), ObserveConfig(), 3, rank=1) as observer:
        with observer.phase("train"):
            pass
        assert observer.log(1, METRICS)["time/train"] >= 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_back_what_was_logged_and_nothing_an_interrupted_run_left(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder(tmp_path)
    with Observer(folder, ObserveConfig(), 4) as observer:
        for step in (1, 2, 3):
            observer.log(step, {"accuracy": 0.1 * step, "kl": None})
    with Observer(folder, ObserveConfig(), 4, start_step=2) as observer:
        for step in (3, 4):
            observer.log(step, {"accuracy": 0.2 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {event.step: event.value for event in events.Scalars("accuracy")}
    assert scalars == pytest.approx({1: 0.1, 2: 0.2, 3: 0.6, 4: 0.8})
    assert "kl" not in events.Tags()["scalars"]


def test_wandb_that_is_not_installed_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"observe\.wandb: 'efr' .* pip install"):
        Observer(RunFolder(tmp_path), ObserveConfig(tensorboard=False, wandb="efr"), 1)


def test_wandb_that_is_installed_by_half_says_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("import no_such_part_of_it\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=r"which does not import \(No module named 'no_such_part_of_it'\); pip"
    ):
        Observer(RunFolder(tmp_path / "run"), ObserveConfig(tensorboard=False, wandb="efr"), 1)


def test_all_outputs_get_the_same_figures_from_one_place(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = {}
    run = SimpleNamespace(
        log=lambda figures, step: told.update({step: figures}), finish=lambda: told.update(end=True)
    )
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **named: told.update(named) or run)
    )
    folder = RunFolder(tmp_path)
    with Observer(folder, ObserveConfig(wandb="efr"), 2, name="family/run") as observer:
        for step in (1, 2):
            observer.log(step, {"accuracy": 0.25 * step, "what": "text"})
    assert (told["project"], told["id"], told["resume"], told["end"]) == (
        "efr",
        "family-run",
        "allow",
        True,
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for line in folder.read_metrics():
        numbers = {key: value for key, value in line.items() if key not in ("step", "what")}
        assert told[line["step"]] == numbers
        scalars = {key: events.Scalars(key)[line["step"] - 1].value for key in numbers}
        assert scalars == pytest.approx(numbers)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (67, "1m07s"), (3600, "1h00m"), (7503, "2h05m")],
)
def test_durations_read_easily(seconds, text):
    assert duration(seconds) == text


HANGS = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from megatron_efr.config import ObserveConfig
from megatron_efr.log import duration
from megatron_efr.observe import Observer
from megatron_efr.run.folder import RunFolder
path = Path(sys.argv[1])
observer = Observer(RunFolder(path), ObserveConfig(tensorboard=False, watchdog_s=0.5), 1, rank=3)
for _ in range(4):
    with observer.phase("rollout"):
        time.sleep(0.2)  # together longer than the limit, each shorter
with observer.phase("train"):
    def waits_for_ever():
        time.sleep(60)
    waits_for_ever()
"""


def test_the_watchdog_names_phase_and_rank_dumps_stacks_and_ends_the_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == EXIT_STUCK
    written = (tmp_path / "stuck_rank3.txt").read_text()
    for text in (done.stderr, written):
        assert "rank 3 has been in phase 'train'" in text
        assert f"exit code {EXIT_STUCK}" in text
        assert "waits_for_ever" in text


def test_a_watchdog_that_is_closed_ends_nothing_and_refuses_a_limit_of_zero():
    dog = Watchdog(0.05)
    dog.beat("x")
    dog.close()
    time.sleep(0.1)
    with pytest.raises(ValueError, match="positive"):
        Watchdog(0)


def test_a_terminal_gets_a_line_per_step_and_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out, limit = "", time.monotonic() + 20
    with Observer(RunFolder(tmp_path), QUIET, 3) as observer:
        with observer.phase("rollout"):
            # the bar is drawn ten times a second
            while "rollout" not in out and time.monotonic() < limit:
                time.sleep(0.05)
                out += capsys.readouterr().out
        observer.log(1, METRICS)
    out += capsys.readouterr().out
    assert "\x1b[" in out
    assert "rollout" in out
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "1/3  accuracy  81.2%  tokens    41.2" in plain
