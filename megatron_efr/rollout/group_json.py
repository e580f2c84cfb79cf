"""Groups as lines of JSON, losslessly: as an engine gave them for the journal, credited for the
rollouts' file.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_efr.rollout.request_json import (
    decode_prompt,
    decode_scripts,
    encode_prompt,
    encode_scripts,
)
from megatron_efr.steps import Part
from megatron_efr.types import (
    Branch,
    Credit,
    Credited,
    Grade,
    Graded,
    Group,
    Response,
    Rewarded,
    VersionSpan,
)


def encode_group(group: Group) -> str:
    """One line of JSON. Floats are written by repr and read back exactly; `prompt.meta` must be
    JSON-ready.
    """
    return _line(_encode_group(group))


def decode_group(line: str | bytes) -> Group:
    """The group that `encode_group` wrote. Raises ValueError or KeyError if the line is no such
    group.
    """
    return _decode_group(json.loads(line))


def encode_graded(group: Graded) -> str:
    """A group and the verdicts on its responses, likewise."""
    return _line(_encode_graded(group))


def decode_graded(line: str | bytes) -> Graded:
    """The graded group that `encode_graded` or `encode_credited` wrote. ValueError, KeyError or
    TypeError elsewhere.
    """
    return _decode_graded(json.loads(line))


def encode_credited(group: Credited) -> str:
    """A group and all that was made of it, likewise: grades, rewards and credit."""
    tree = {
        **_encode_graded(group.graded),
        "rewards": group.rewarded.rewards.tolist(),
        **{name: _encode_credit(getattr(group.credit, name)) for name in Credit._fields},
    }
    return _line(tree)


def decode_credited(line: str | bytes) -> Credited:
    """The group that `encode_credited` wrote, stage by stage. Raises ValueError, KeyError or
    TypeError elsewhere.
    """
    tree = json.loads(line)
    rewarded = Rewarded(_decode_graded(tree), np.array(tree["rewards"], dtype=np.float64))
    # a file that was written before a field was has none of it
    credit = {
        name: _decode_credit(tree[name]) for name in Credit._fields if tree.get(name) is not None
    }
    return Credited(rewarded, Credit(**credit))


def _encode_graded(group: Graded) -> dict[str, Any]:
    tree = {
        **_encode_group(group.group),
        "statuses": [grade.status for grade in group.grades],
        "scores": group.scores.tolist(),
    }
    if group.branches:
        tree["verdicts"] = [
            [[grade.status, grade.score] for grade in each] for each in group.branches
        ]
    return tree


def _decode_graded(tree: dict[str, Any]) -> Graded:
    grades = tuple(Grade(*said) for said in zip(tree["statuses"], tree["scores"], strict=True))
    verdicts = tuple(tuple(Grade(*said) for said in each) for each in tree.get("verdicts", ()))
    return Graded(_decode_group(tree), grades, verdicts)


def _encode_credit(
    values: np.ndarray | Sequence[np.ndarray] | bool | None,
) -> list[Any] | bool | None:
    """A field of a credit: an array, one for each response, yes or no, or nothing."""
    if values is None or isinstance(values, bool):
        return values
    return (
        values.tolist()
        if isinstance(values, np.ndarray)
        else [np.asarray(each).tolist() for each in values]
    )


def _decode_credit(values: list[Any] | bool) -> Any:
    """The array that `_encode_credit` wrote: bool for a mask, else float64."""
    if isinstance(values, bool):
        return values
    if values and isinstance(values[0], list):
        return tuple(np.array(each, dtype=np.float64) for each in values)
    return np.array(values, dtype=bool if values and isinstance(values[0], bool) else np.float64)


def _line(tree: dict[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))


def _encode_group(group: Group) -> dict[str, Any]:
    return {
        "prompt": encode_prompt(group.prompt),
        "responses": [_encode_response(response) for response in group.responses],
        "seed": group.seed,
        "scripts": encode_scripts(group.scripts),
        "note": dict(group.note),
    }


def _decode_group(tree: dict[str, Any]) -> Group:
    responses = tuple(_decode_response(response) for response in tree["responses"])
    scripts = decode_scripts(tree.get("scripts", ()))
    return Group(
        decode_prompt(tree["prompt"]), responses, tree["seed"], scripts, tree.get("note", {})
    )


def _encode_response(response: Response) -> dict[str, Any]:
    tree = {
        "tokens": [int(token) for token in response.tokens],
        "logprobs": [float(value) for value in response.logprobs],
        "finish": response.finish,
        "versions": [list(span) for span in response.versions],
        "text": response.text,
        "parts": [list(part) for part in response.parts],
        "branches": [
            {
                "part": branch.part,
                "at": branch.at,
                "responses": [_encode_response(each) for each in branch.responses],
            }
            for branch in response.branches
        ],
    }
    # a byte each up to 128 experts; as JSON's lists three or four
    if (routed := response.routed_experts) is not None:
        data = base64.b64encode(routed.tobytes()).decode("ascii")
        tree["routed_experts"] = {
            "dtype": str(routed.dtype),
            "shape": list(routed.shape),
            "base64": data,
        }
    return tree


def _decode_response(tree: dict[str, Any]) -> Response:
    changed: dict[str, Any] = {
        "tokens": tuple(tree["tokens"]),
        "logprobs": np.array(tree["logprobs"], dtype=np.float32),
        "versions": tuple(VersionSpan(*span) for span in tree["versions"]),
        "parts": tuple(Part(*part) for part in tree.get("parts", ())),
        "branches": tuple(
            Branch(each["part"], each["at"], tuple(map(_decode_response, each["responses"])))
            for each in tree.get("branches", ())
        ),
    }
    if (routed := tree.get("routed_experts")) is not None:
        flat = np.frombuffer(base64.b64decode(routed["base64"], validate=True), routed["dtype"])
        changed["routed_experts"] = flat.reshape(routed["shape"])
    return Response(**tree | changed)
