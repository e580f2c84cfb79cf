"""Flat keys of a tree: sections are walked, lists only where that is asked, what is empty is a
leaf.
"""

from __future__ import annotations

import pytest

from megatron_efr.config.leaves import leaves

pytestmark = pytest.mark.alike

TREE = {"method": {"name": "laser", "of": {}}, "sets": [{"path": "a"}, 3], "ids": [1, 2]}


def test_every_leaf_has_its_dotted_key() -> None:
    ends = {"method.name": "laser", "method.of": {}, "ids": [1, 2]}
    assert dict(leaves("", TREE)) == ends | {"sets": [{"path": "a"}, 3]}
    assert dict(leaves("", TREE, within_lists=True)) == ends | {"sets.0.path": "a", "sets.1": 3}
    assert list(leaves("seed", 5)) == [("seed", 5)]
    assert list(leaves("", {})) == [("", {})]
