"""Groups as lines of JSON, losslessly: as an engine gave them for the journal, credited for the rollouts' file."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from megatron_efr.types import Credit, Credited, Grade, Graded, Group, Prompt, Response, Rewarded, VersionSpan


def encode_group(group: Group) -> str:
    """One line of JSON. Floats are written by repr and read back exactly; `prompt.meta` must be JSON-ready."""
    return _line(_encode_group(group))


def decode_group(line: str | bytes) -> Group:
    """The group that `encode_group` wrote. Raises ValueError or KeyError where the line is no such group."""
    return _decode_group(json.loads(line))


def encode_credited(group: Credited) -> str:
    """A group and all that was made of it, likewise: grades, rewards and credit."""
    tree = {
        **_encode_group(group.group),
        "statuses": [grade.status for grade in group.graded.grades],
        "scores": group.graded.scores.tolist(),
        "rewards": group.rewarded.rewards.tolist(),
        "advantage": group.credit.advantage.tolist(),
        "masked": None if group.credit.masked is None else group.credit.masked.tolist(),
    }
    return _line(tree)


def decode_credited(line: str | bytes) -> Credited:
    """The group that `encode_credited` wrote, stage by stage. Raises ValueError, KeyError or TypeError elsewhere."""
    tree = json.loads(line)
    grades = tuple(Grade(*said) for said in zip(tree["statuses"], tree["scores"], strict=True))
    graded = Graded(_decode_group(tree), grades)
    rewarded = Rewarded(graded, np.array(tree["rewards"], dtype=np.float64))
    masked = None if tree["masked"] is None else np.array(tree["masked"], dtype=bool)
    return Credited(rewarded, Credit(np.array(tree["advantage"], dtype=np.float64), masked))


def _line(tree: dict[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))


def _encode_group(group: Group) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "prompt": {
            "id": prompt.id,
            "tokens": list(prompt.tokens),
            "text": prompt.text,
            "gold": prompt.gold,
            "meta": dict(prompt.meta),
        },
        "responses": [_encode_response(response) for response in group.responses],
        "seed": group.seed,
    }


def _decode_group(tree: dict[str, Any]) -> Group:
    prompt = Prompt(**{**tree["prompt"], "tokens": tuple(tree["prompt"]["tokens"])})
    return Group(prompt, tuple(_decode_response(response) for response in tree["responses"]), tree["seed"])


def _encode_response(response: Response) -> dict[str, Any]:
    tree = {
        "tokens": [int(token) for token in response.tokens],
        "logprobs": [float(value) for value in response.logprobs],
        "finish": response.finish,
        "versions": [list(span) for span in response.versions],
        "text": response.text,
    }
    if (routed := response.routed_experts) is not None:  # a byte each up to 128 experts; as JSON's lists three or four
        data = base64.b64encode(routed.tobytes()).decode("ascii")
        tree["routed_experts"] = {"dtype": str(routed.dtype), "shape": list(routed.shape), "base64": data}
    return tree


def _decode_response(tree: dict[str, Any]) -> Response:
    changed: dict[str, Any] = {
        "tokens": tuple(tree["tokens"]),
        "logprobs": np.array(tree["logprobs"], dtype=np.float32),
        "versions": tuple(VersionSpan(*span) for span in tree["versions"]),
    }
    if (routed := tree.get("routed_experts")) is not None:
        flat = np.frombuffer(base64.b64decode(routed["base64"], validate=True), routed["dtype"])
        changed["routed_experts"] = flat.reshape(routed["shape"])
    return Response(**tree | changed)
