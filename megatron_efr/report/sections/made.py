"""Provenance: what took how long, versions, how problems were asked, seeds, and the configuration
of every run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from megatron_efr.config.leaves import leaves
from megatron_efr.log import duration
from megatron_efr.report.results import Results

_OWN = ("name", "runs")


def build(results: Results) -> dict[str, Any] | str:
    """Seconds, versions, how problems were asked, what differs between the runs, every
    configuration.
    """
    seconds = [
        (part, duration(value))
        for part, value in results.summary.get("seconds", {}).items()
        if value is not None
    ]
    if not (seconds or results.versions or results.configs):
        return "Neither configuration nor versions were given."
    return {
        "seconds": seconds,
        "versions": dict(results.versions),
        "protocols": _protocols(results),
        "runs": differences(results.configs),
        "configs": dict(results.configs),
    }


def differences(configs: Mapping[str, str]) -> list[tuple[str, str]]:
    """(run, its keys that differ between the runs, as text) of each configuration that can be
    read.
    """
    trees = {name: tree for name, text in configs.items() if isinstance(tree := _read(text), dict)}
    if len(trees) < 2:
        return []
    values = {name: {k: json.dumps(v) for k, v in leaves("", tree)} for name, tree in trees.items()}
    keys = dict.fromkeys(key for own in values.values() for key in own if key not in _OWN)
    differing = [key for key in keys if len({own.get(key) for own in values.values()}) > 1]
    return [
        (name, ", ".join(f"{key} = {own[key]}" for key in differing if key in own))
        for name, own in values.items()
    ]


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _protocols(results: Results) -> list[str]:
    """Ways in which the problems were asked, each once."""
    records = [record for model in results.models for record in results.records(model)]
    texts = [
        ", ".join(f"{key} = {json.dumps(value)}" for key, value in leaves("", record["protocol"]))
        for record in records
        if record.get("protocol")
    ]
    return list(dict.fromkeys(texts))
