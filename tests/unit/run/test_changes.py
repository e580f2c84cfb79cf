"""Folders that a resumed run takes: an older version's config.yaml, which lacks keys, is the same
configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_efr.config import ConfigError, TrainConfig
from megatron_efr.config.file import validate
from megatron_efr.run.changes import refusal
from megatron_efr.run.run import written_out

TREE: dict[str, Any] = {
    "name": "run",
    "model": {"path": "m"},
    "data": {"datasets": [{"path": "x.jsonl"}]},
    "method": {"name": "efr", "alpha": 0.1},
    "optimizer": {"lr": 1e-3},
}


def resolved(tree: dict[str, Any]) -> str:
    return written_out(validate(TrainConfig, tree))


def refused(folder: Path, held: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """True if a run of `ours` may go on if `held` is the config.yaml."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(held))
    return refusal(config, resolved(ours), True, resolved)


def lacking(tree: Any) -> Iterator[tuple[str, Any]]:
    """The tree without one of its keys or sections, for each of them."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key, {other: tree[other] for other in tree if other != key}
            for below, changed in lacking(value):
                yield f"{key}.{below}", tree | {key: changed}
    elif isinstance(tree, list) and tree and isinstance(tree[0], dict):
        yield from ((f"0.{below}", [changed, *tree[1:]]) for below, changed in lacking(tree[0]))


def test_a_key_that_an_older_configuration_lacks_is_no_difference_where_it_has_its_default(
    tmp_path: Path,
) -> None:
    older, required = dict(lacking(yaml.safe_load(resolved(TREE)))), []
    for key, held in older.items():
        try:
            validate(TrainConfig, held)
        except ConfigError:
            required.append(key)
            continue
        differs = refused(tmp_path, held, TREE)
        if key in ("method", "method.alpha"):
            assert differs is not None
            assert (
                "method.alpha: there 0.0, here 0.1" in differs
                or "method.alpha: there '(not set)', here 0.1" in differs
            )
        else:
            assert differs is None, key
    assert {"name", "optimizer.lr", "data.datasets.0.path"} <= set(required)
    assert {"algorithm.beta", "train.max_skipped", "data.datasets.0.grading", "rollout"} <= set(
        older
    ) - set(required)


def test_where_it_has_another_value_now_the_default_stands_beside_it(tmp_path: Path) -> None:
    held = yaml.safe_load(resolved(TREE))
    del held["rollout"]["samples"], held["algorithm"]["beta"]
    said = refused(tmp_path, held, TREE | {"rollout": {"samples": 3}, "algorithm": {"beta": 0.5}})
    assert said is not None
    assert "  rollout.samples: there 8, here 3\n" in said
    assert "  algorithm.beta: there 0.001, here 0.5\n" in said


def test_micro_batches_may_have_another_size_as_an_older_version_wrote_it_out(
    tmp_path: Path,
) -> None:
    held = yaml.safe_load(resolved(TREE))
    assert held["train"]["micro_batch_tokens"] is None
    held["train"]["micro_batch_tokens"] = 16_384
    for ours in (TREE, TREE | {"train": {"micro_batch_tokens": 4096}}):
        assert refused(tmp_path, held, ours) is None
        config = tmp_path / "config.yaml"
        assert "train.micro_batch_tokens: there 16384" in str(
            refusal(config, resolved(ours), False, resolved)
        )


def test_what_this_version_does_not_know_is_a_difference(tmp_path: Path) -> None:
    held = yaml.safe_load(resolved(TREE))
    held["rollout"]["gone"] = 5
    said = refused(tmp_path, held, TREE)
    assert said is not None
    assert "  rollout.gone: there 5, here '(not set)'\n" in said
    with pytest.raises(ConfigError, match="gone"):
        validate(TrainConfig, held)
