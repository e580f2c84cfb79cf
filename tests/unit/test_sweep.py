"""`efr sweep`: which model each of its evaluations takes, and which engines; how its programs end
with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_efr import sweep
from megatron_efr.config import EvaluateConfig, EvaluationEnginesConfig, RolloutConfig
from megatron_efr.config.file import load
from megatron_efr.errors import UserError
from megatron_efr.run import side_by_side


def evaluations(
    place: Path, monkeypatch: pytest.MonkeyPatch, rollout: dict[str, Any]
) -> list[EvaluateConfig]:
    """Of a sweep of two ranks, whose programs are not run: the base's, and that of the one model it
    trains.
    """
    tree = {
        "name": "family",
        "runs": str(place),
        "model": {"path": str(place / "model"), "init": "random", "lora": {"rank": 4}},
        "data": {"datasets": [{"path": "train.jsonl"}]},
        "rollout": rollout,
        "method": {"name": "efr"},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"datasets": [{"path": "test.jsonl"}]},
    }
    (place / "rl.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(sweep, "check_members", lambda *_: None)  # there are no files
    monkeypatch.setattr(
        side_by_side.Programs, "run", lambda _, name, command: name.startswith("eval")
    )
    with pytest.raises(UserError, match=r"eval base, eval alpha-0\.1 failed"):
        sweep.main([str(place / "rl.yaml"), "--alphas=0.1", "--ranks=2"])
    names = ("base", "alpha-0.1")
    return [load(EvaluateConfig, place / f"family/configs/eval-{name}.yaml") for name in names]


def test_the_base_is_evaluated_as_the_runs_begin_with_it_and_the_others_as_they_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, trained = evaluations(
        tmp_path, monkeypatch, {"placement": "colocated", "engine": "sglang", "router": True}
    )
    assert (base.model.path, base.model.init) == (str(tmp_path / "model"), "random")
    assert (trained.model.path, trained.model.init) == (
        str(tmp_path / "family/alpha-0.1/model"),
        "load",
    )
    assert base.rollout == trained.rollout
    assert (trained.rollout.engine, trained.rollout.engines, trained.rollout.router) == (
        "sglang",
        2,
        True,
    )


@pytest.mark.parametrize("flag", ["--jobs", "--ranks"])
def test_numbers_that_make_no_sweep_are_refused_by_flag(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["a.yaml", f"{flag}=0"])
    assert f"error: argument {flag}: 0: at least 1\n" in capsys.readouterr().err


def test_weights_go_by_a_folder_but_to_servers_that_may_not_see_it() -> None:
    def transport(**rollout: Any) -> str:
        return RolloutConfig(engine="sglang", **rollout).for_evaluation(1).transport

    urls = ["http://a:1"]
    assert (transport(), transport(urls=urls), transport(urls=urls, transport="disk")) == (
        "disk",
        "tensor",
        "disk",
    )
    assert transport(transport="distributed") == "disk", (
        "servers that it starts are on its own machine"
    )
    assert RolloutConfig().for_evaluation(8) == EvaluationEnginesConfig()


SWEEP = """
import sys
from pathlib import Path
from megatron_efr import arguments
from megatron_efr.run import side_by_side

side_by_side.END_WITHIN_S = float(sys.argv[3])
program = (
    "import signal, sys, time\\n"
    "def end(number, frame): print('got', number, flush=True); {saves}\\n"
    "for number in (2, 10, 15): signal.signal(number, end)\\n"
    "print('works', flush=True); time.sleep(60)"
)
commands = [(name, [sys.executable, "-c", program]) for name in ("one", "two", "three")]
arguments.run(lambda _: side_by_side.side_by_side(commands, Path(sys.argv[2]), jobs=2))
"""
SAVES, FAILS, STAYS = "sys.exit(75)", "sys.exit(3)", "None"


def asked_to_end(
    place: Path, saves: str, *signals: int, seconds: float = 60
) -> tuple[int, str, list[str]]:
    """Of a sweep of three programs, two at a time, whose group gets these signals: exit code,
    stderr, their logs.
    """
    text = SWEEP.format(saves=saves)
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sweeping = subprocess.Popen(
        [sys.executable, "-c", text, saves, str(place), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heeds,
    )
    assert sweeping.stdout is not None
    for _ in range(2):
        assert sweeping.stdout.readline().endswith("| works\n")
    for number in signals:
        os.killpg(sweeping.pid, number)  # as a terminal does
        sweeping.stdout.readline()
    err = sweeping.communicate(timeout=60)[1]
    return (
        sweeping.returncode,
        err,
        [path.read_text() for path in sorted(place.iterdir()) if path.stat().st_size],
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_sweep_that_is_asked_to_end_lets_its_programs_save_and_begins_no_other(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    found, err, logs = asked_to_end(tmp_path, SAVES, number)
    assert found == code
    assert logs == ["works\ngot 15\n"] * 2, "one signal each, and that asks to save"
    said = (
        f"sweep: {number.name}: one, two asked to end, and waited for 60 s; a second signal kills\n"
    )
    assert err == said + "interrupted\n" * (number == signal.SIGINT)


def test_a_program_that_ends_at_once_when_asked_is_still_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sent(process: subprocess.Popen[str], number: int) -> None:
        os.kill(process.pid, number)
        process.wait()  # has ended before the next line of `end` runs

    monkeypatch.setattr(subprocess.Popen, "send_signal", sent)
    programs = side_by_side.Programs(tmp_path)
    sleeps = [sys.executable, "-S", "-c", "import time; print('works', flush=True); time.sleep(60)"]
    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(programs.run, "one", sleeps)
        while not (log := tmp_path / "one.txt").exists() or not log.read_text():
            time.sleep(0.01)
        assert programs.end(signal.SIGTERM) == {"one"}
        assert code.result() == -signal.SIGTERM


def test_a_second_signal_ends_a_sweep_at_once(tmp_path: Path) -> None:
    assert asked_to_end(tmp_path / "a", STAYS, signal.SIGTERM, signal.SIGTERM)[0] == 143
    assert asked_to_end(tmp_path / "b", STAYS, signal.SIGINT, signal.SIGINT)[0] == 130


def test_sigusr1_announces_sigterm_which_then_asks_again_and_kills_nothing(tmp_path: Path) -> None:
    code, _, logs = asked_to_end(
        tmp_path, "time.sleep(1); sys.exit(75)", signal.SIGUSR1, signal.SIGTERM
    )
    assert (code, logs) == (75, ["works\ngot 15\n"] * 2)


def test_programs_that_do_not_end_in_time_are_killed_and_go_on_from_their_last_checkpoints(
    tmp_path: Path,
) -> None:
    assert (
        asked_to_end(
            tmp_path, STAYS.replace("None", "time.sleep(60)"), signal.SIGTERM, seconds=0.3
        )[0]
        == 75
    )


WAITS = """
import sys, time
from pathlib import Path
until = time.monotonic() + 30
while not Path(sys.argv[1]).exists():
    time.sleep(0.02)
    if time.monotonic() > until: sys.exit("nothing made it")
"""


def test_what_follows_a_program_fills_the_job_that_another_leaves_idle(tmp_path: Path) -> None:
    made = tmp_path / "made"
    python = [sys.executable, "-S", "-c"]
    commands = [("long", [*python, WAITS, str(made)]), ("short", [*python, "pass"])]
    follows = {"short": [("after short", [*python, f"open({str(made)!r}, 'w')"])]}
    ended: list[str] = []

    def begin(name: str, well: bool) -> list[side_by_side.Command]:
        assert well
        ended.append(name)
        return follows.get(name, [])

    side_by_side.side_by_side(commands, tmp_path / "logs", 2, begin)
    assert sorted(ended) == ["after short", "long", "short"]
    assert ended[0] == "short"


def test_what_follows_a_program_waits_behind_all_others_and_fails_by_its_own_name(
    tmp_path: Path,
) -> None:
    python = [sys.executable, "-S", "-c"]
    commands = [(name, [*python, "pass"]) for name in ("one", "two")]
    ended: list[str] = []

    def begin(name: str, well: bool) -> list[side_by_side.Command]:
        assert well == (name != "two after")
        ended.append(name)
        exits = [*python, f"raise SystemExit({name == 'two':d})"]
        return [] if " " in name else [(f"{name} after", exits)]

    with pytest.raises(side_by_side.FailedError, match=r"^two after failed"):
        side_by_side.side_by_side(commands, tmp_path, 1, begin)
    assert ended == ["one", "two", "one after", "two after"]


def test_bytes_that_are_no_text_end_no_sweep(tmp_path: Path) -> None:
    told = ["-S", "-c", "import os; os.write(1, b'a \\xff\\n')"]
    side_by_side.side_by_side([("one", [sys.executable, *told])], tmp_path, 1)
    assert (tmp_path / "one.txt").read_text(encoding="utf-8") == "a \ufffd\n"


def test_a_program_that_fails_as_it_ends_is_named(tmp_path: Path) -> None:
    code, err, _ = asked_to_end(tmp_path, FAILS, signal.SIGTERM)
    assert code == 2
    assert f"error: one, two failed; see {tmp_path}" in err
