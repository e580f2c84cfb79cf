"""`efr train` with rollouts of a real SGLang server that run ahead of the policy: partial and
asynchronous at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest

from megatron_efr.data.arithmetic import ArithmeticTask, write
from megatron_efr.run.folder import RunFolder
from tests.engine.conftest import PYTHON
from tests.loop.conftest import install_method

CONFIG = """
name: ahead
runs: {place}
seed: 5
model: {{path: {place}/task/model, init: random}}
data: {{datasets: [{{path: {place}/task/train.jsonl}}], prompt: {{template: "{{question}}"}}}}
rollout:
  {{engine: sglang, python: {python}, prompts: 6, samples: 4, max_new_tokens: 60, slots: 16, partial: true, async: true,
   max_staleness: 2}}
method: {{name: typical}}
algorithm: {{beta: 0.0}}
optimizer: {{lr: 1e-3}}
train: {{iterations: 5}}
evaluation: {{datasets: [{{path: {place}/task/test.jsonl, limit: 4}}], every: 2, max_new_tokens: 20}}
checkpoint: {{every: 5}}
observe: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    if not os.access(PYTHON, os.X_OK):
        pytest.skip(f"{PYTHON} is not there: bash tools/setup_sglang_cpu.sh makes it")
    place = tmp_path_factory.mktemp("ahead")
    write(place / "task", 0, ArithmeticTask(max_terms=3, train_rows=24, test_rows=16, sft_rows=64))
    install_method(place)
    (place / "config.yaml").write_text(CONFIG.format(place=place, python=PYTHON))
    paths = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_efr.train", str(place / "config.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return RunFolder(place / "ahead")


def test_publications_reach_responses_in_flight_and_none_is_lost(run: RunFolder) -> None:
    groups = {step: [each.group for each in run.read_rollouts(step)] for step in range(1, 6)}
    assert [len(taken) for taken in groups.values()] == [6] * 5
    assert len({group.seed for taken in groups.values() for group in taken}) == 30
    for step, taken in groups.items():
        for response in (response for group in taken for response in group.responses):
            assert response.finish in ("stop", "length")
            assert response.versions[0].start == 0
            assert response.versions[-1].end == response.length
            assert all(
                a.end == b.start and a.version < b.version for a, b in pairwise(response.versions)
            )
            assert step - 3 <= response.versions[0].version <= step - 1


def test_log_probs_of_the_policys_own_version_agree_and_older_ones_are_told_apart(
    run: RunFolder,
) -> None:
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert line["first_ratio_max"] == 1
        assert line["logprob_diff_max"] is None or line["logprob_diff_max"] <= 1e-4
        assert line["staleness_max"] <= 2
    assert lines[0]["logprob_diff_max"] <= 1e-4
    assert max(line["staleness_max"] for line in lines) >= 1
    stale = [
        line["logprob_diff_lag1_mean"] for line in lines[1:] if "logprob_diff_lag1_mean" in line
    ]
    assert stale
    assert min(stale) > 1e-4, "another version's log-probs, and no difference"
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [2, 4]
