"""`efr sweep`: which model each of its evaluations takes, and which engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_efr import sweep
from megatron_efr.config import EvaluateConfig, EvaluationEnginesConfig, RolloutConfig, TrainConfig
from megatron_efr.config.file import load
from megatron_efr.errors import UserError
from megatron_efr.run import side_by_side


def evaluations(place: Path, monkeypatch: pytest.MonkeyPatch, rollout: dict[str, Any]) -> list[EvaluateConfig]:
    """Of a sweep of two ranks, whose programs are not run: the base's, and that of the one model it trains."""
    tree = {
        "name": "family",
        "runs": str(place),
        "model": {"path": str(place / "model"), "init": "random"},
        "data": {"datasets": [{"path": "train.jsonl"}]},
        "rollout": rollout,
        "method": {"name": "efr"},
        "optimizer": {"lr": 1e-3},
        "evaluation": {"datasets": [{"path": "test.jsonl"}]},
    }
    monkeypatch.setattr(sweep, "check_evaluation", lambda config: None)  # there are no files
    monkeypatch.setattr(side_by_side, "_run", lambda name, *_: name.startswith("eval"))
    with pytest.raises(UserError, match=r"eval base, eval alpha-0\.1 failed"):
        sweep.Family(TrainConfig.model_validate(tree), [0.1], 2).run(1, {}, "", resume=False)
    names = ("base", "alpha-0.1")
    return [load(EvaluateConfig, place / f"family/configs/eval-{name}.yaml") for name in names]


def test_the_base_is_evaluated_as_the_runs_begin_with_it_and_the_others_as_they_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, trained = evaluations(tmp_path, monkeypatch, {"placement": "colocated", "engine": "sglang", "router": True})
    assert (base.model.path, base.model.init) == (str(tmp_path / "model"), "random")
    assert (trained.model.path, trained.model.init) == (str(tmp_path / "family/alpha-0.1/model"), "load")
    assert base.rollout == trained.rollout
    assert (trained.rollout.engine, trained.rollout.engines, trained.rollout.router) == ("sglang", 2, True)


def test_weights_go_by_a_folder_but_to_servers_that_may_not_see_it() -> None:
    def transport(**rollout: Any) -> str:
        return RolloutConfig(engine="sglang", **rollout).for_evaluation(1).transport

    urls = ["http://a:1"]
    assert (transport(), transport(urls=urls), transport(urls=urls, transport="disk")) == ("disk", "tensor", "disk")
    assert transport(transport="distributed") == "disk", "servers that it starts are on its own machine"
    assert RolloutConfig().for_evaluation(8) == EvaluationEnginesConfig()
