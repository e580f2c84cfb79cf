"""Grading: the last box, math-verify's verdicts, and expressions that hang, crash or eat memory."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_efr.grading import STATUSES, Grade, Grader, GraderError, count_statuses, grade
from megatron_efr.grading import pool as pool_module
from megatron_efr.grading.boxed import last_boxed
from megatron_efr.grading.pool import _plain_verdict
from megatron_efr.grading.verdict import MATH, Question

pytestmark = pytest.mark.alike

LIMIT_S = 0.5
TOWER = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(workers=1, timeout_s=LIMIT_S) as pool:
        yield pool


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}, no: \boxed{7}", "7"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),  # a printed brace opens nothing
        (r"\boxed {8}", "8"),
        (r"first \boxed{3}, with the \boxed command", "3"),
        (r"\boxed{4} and then \boxed{5", None),  # the last box never closes
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_box(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("gold", "response", "status"),
    [
        ("17", r"\boxed{17}", "correct"),
        ("17", r"\boxed{18}", "wrong"),
        ("7", r"\boxed{5}, no: \boxed{7}", "correct"),
        ("5", r"\boxed{5}, no: \boxed{7}", "wrong"),
        ("17", "it is 17", "no_answer"),
        ("17", r"\boxed{}", "no_answer"),
        (r"\frac{1}{2}", r"\boxed{0.5}", "correct"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", "correct"),
        ("1234", r"\boxed{1{,}234}", "correct"),
        (r"\text{Evelyn}", r"\boxed{Evelyn}", "correct"),
        ("17", r"\boxed{foo bar ((}", "unparsed"),
        ("$17$", r"\boxed{17}", "correct"),
        ("((", r"\boxed{17}", "bad_gold"),
        # Asymmetric: math-verify follows the gold's form.
        ("1 < x < 2", r"\boxed{(1, 2)}", "correct"),
        ("(1, 2)", r"\boxed{1 < x < 2}", "wrong"),
        ("1", r"\boxed{2x + z = 1}", "correct"),
        ("2x + z = 1", r"\boxed{1}", "wrong"),
    ],
)
def test_verdicts(grader: Grader, gold: str, response: str, status: str) -> None:
    [verdict] = grader.grade([response], [gold])
    assert verdict == Grade(status)
    assert verdict.correct == (status == "correct")


HOSTILE = {
    "power tower": TOWER,
    "huge power": r"\boxed{10^{10^{10}}}",
    "factorial": r"\boxed{((10^{7})!)!}",
    "nested braces": r"\boxed{" + "{" * 10_000 + "5" + "}" * 10_000 + "}",
    "nested parentheses": r"\boxed{" + "(" * 10_000 + "5" + ")" * 10_000 + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 10_000 + "5" + "}" * 10_000 + "}",
    "endless simplification": r"\boxed{(1+x)^{100000} - (1+x)^{99999}}",
    "integral": r"\boxed{\int_0^1 x^x \sin(x^{x}) e^{x^{2}} dx}",
    "long sum": r"\boxed{\sum_{k=1}^{10^{9}} \frac{1}{k^3+1}}",
    "nested radicals": r"\boxed{" + r"\sqrt{2+" * 60 + "2" + "}" * 60 + "}",
    "digits": r"\boxed{" + "9" * 200_000 + "}",
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_expression_costs_only_itself(grader: Grader, name: str) -> None:
    responses = [r"\boxed{x+1}", r"\boxed{x+2}", HOSTILE[name], r"\boxed{\frac{34}{2}}", "none"]
    started = time.monotonic()
    statuses = [
        verdict.status for verdict in grader.grade(responses, ["1+x", "1+x", "17", "17", "17"])
    ]
    assert time.monotonic() - started < 20 * LIMIT_S
    assert statuses[2] in {"timeout", "memory", "crash", "unparsed"}
    assert statuses[:2] + statuses[3:] == ["correct", "wrong", "correct", "no_answer"]


def test_hang_is_named_timeout_and_ended_by_cpu_time(grader: Grader) -> None:
    grader.grade([r"\boxed{\frac12}"], ["0.5"])  # warm
    [before] = grader.pids
    started = time.monotonic()
    assert [verdict.status for verdict in grader.grade([TOWER], ["17"])] == ["timeout"]
    assert time.monotonic() - started >= LIMIT_S
    assert not psutil.pid_exists(before)


@pytest.mark.heavy
def test_memory_limit_is_named() -> None:
    with Grader(timeout_s=60.0, memory_bytes=200 << 20) as pool:
        statuses = [
            v.status
            for v in pool.grade(
                [r"\boxed{\frac12}", r"\boxed{2^{3000000000}}", r"\boxed{2x}"], ["0.5", "17", "x+x"]
            )
        ]
    assert statuses == ["correct", "memory", "correct"]


def test_limit_below_the_processs_own_size_is_named_too() -> None:
    with (
        Grader(memory_bytes=1 << 20) as pool,
        pytest.raises(GraderError, match="before they were ready"),
    ):
        pool.grade([r"\boxed{2x}"], ["x+x"])


@pytest.mark.heavy
def test_processes_end_with_a_parent_that_was_killed() -> None:
    """Idle or hanging: the first sees its pipe end, the second meets the kernel's CPU limit."""
    code = (
        "import sys, threading, time\n"
        "from megatron_efr.grading import Grader\n"
        "pool = Grader(workers=2, timeout_s=1.0)\n"
        "pool.grade([r'\\boxed{2x}', r'\\boxed{3x}'], ['x+x', 'x+2x'])\n"
        f"threading.Thread(target=pool.grade, args=([r'{TOWER}'], ['17'])).start()\n"
        "time.sleep(0.3)\n"
        "print(*pool.pids, flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    """A zombie that nobody has reaped yet does not run."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_killed_worker_costs_one_response() -> None:
    """Every response is graded right but the one on which the process was killed from outside."""
    with Grader(workers=1, timeout_s=60.0) as pool:
        pool.grade([r"\boxed{\frac12}"], ["0.5"])
        [victim] = pool.pids
        killer = threading.Timer(0.5, os.kill, (victim, 9))
        killer.start()
        statuses = [
            v.status
            for v in pool.grade([r"\boxed{x+1}", TOWER, r"\boxed{2x}"], ["1+x", "17", "x+x"])
        ]
        killer.join()
        assert statuses == ["correct", "crash", "correct"]
        assert pool.pids != [victim]


def test_worker_killed_while_idle_costs_nothing(grader: Grader) -> None:
    grader.grade([r"\boxed{\frac12}"], ["0.5"])
    [idle] = grader.pids
    os.kill(idle, 9)
    psutil.Process(idle).wait(timeout=5)
    assert [v.status for v in grader.grade([r"\boxed{x+1}"], ["1+x"])] == ["correct"]


@pytest.mark.heavy
def test_stopped_worker_is_a_crash() -> None:
    """A process that uses no CPU at all is not left to wait for."""
    with Grader(timeout_s=60.0, stall_s=0.5) as pool:
        pool.grade([r"\boxed{\frac12}"], ["0.5"])
        stopper = threading.Timer(0.2, os.kill, (pool.pids[0], 19))
        stopper.start()
        statuses = [v.status for v in pool.grade([TOWER, r"\boxed{2x}"], ["17", "x+x"])]
        stopper.join()
    assert statuses == ["crash", "correct"]


@pytest.mark.heavy
def test_order_is_kept_over_workers() -> None:
    golds = [f"x+{i}" for i in range(40)]
    responses = [rf"\boxed{{{i}+x}}" if i % 3 else rf"\boxed{{{i}-x}}" for i in range(40)]
    responses[7] = TOWER
    with Grader(workers=2, timeout_s=LIMIT_S) as pool:
        statuses = [v.status for v in pool.grade(responses, golds)]
    expected = ["correct" if i % 3 else "wrong" for i in range(40)]
    expected[7] = "timeout"
    assert statuses == expected


def test_warm_pool_is_fast(grader: Grader) -> None:
    responses = [rf"so \boxed{{{i}.0}}" for i in range(256)]
    grader.grade(responses[:1], ["0"])
    [pid] = grader.pids
    before = sum(psutil.Process(pid).cpu_times()[:2])
    counts = count_statuses(grader.grade(responses, [str(i % 128) for i in range(256)]))
    # seconds of CPU, 0.3 on an idle core
    assert sum(psutil.Process(pid).cpu_times()[:2]) - before < 2.0
    assert counts == {**dict.fromkeys(STATUSES, 0), "correct": 128, "wrong": 128}


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(gold=st.integers(-(10**17), 10**17), offset=st.sampled_from([0, 1, -1, 10**9]))
@example(gold=0, offset=0)
@example(gold=123456789012345678, offset=1)
def test_plain_integers_get_math_verifys_verdict(grader: Grader, gold: int, offset: int) -> None:
    """The path that skips the worker, held against the worker."""
    answer = str(gold + offset)
    question = Question(MATH, str(gold), answer)
    short = _plain_verdict(question)
    assert short in {"correct", "wrong"}
    [verdict] = grader._run([question])
    assert verdict.status == short


@pytest.mark.parametrize("text", ["007", "1,000", "5.0", "-0", "+5", "1" * 19, "٣", "5\n"])
def test_other_numbers_go_to_math_verify(text: str) -> None:
    assert _plain_verdict(Question(MATH, text, text)) == ""


def test_function_with_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="2 responses and 1 gold"):
        grade(["a", "b"], ["1"])


def test_empty() -> None:
    assert grade([], []) == []


@pytest.mark.parametrize(("workers", "timeout_s"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_impossible_limits(workers: int, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="workers >= 1 and timeout_s > 0"):
        Grader(workers, timeout_s)


def test_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module.sys, "executable", "/bin/false")
    with Grader() as pool, pytest.raises(GraderError, match="died before they were ready"):
        pool.grade([r"\boxed{2x}"], ["x+x"])


def test_close_ends_the_processes_and_the_grader_can_go_on() -> None:
    pool = Grader()
    pool.grade([r"\boxed{2x}"], ["x+x"])
    [pid] = pool.pids
    pool.close()
    assert not psutil.pid_exists(pid)
    assert pool.pids == []
    assert pool.grade([r"\boxed{2x}"], ["x+x"])[0].correct
    pool.close()


def test_worker_does_not_import_torch() -> None:
    code = (
        "import sys, megatron_efr.grading.worker, megatron_efr.grading, math_verify; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
