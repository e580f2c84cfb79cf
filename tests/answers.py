"""A file of judged answers, as a run keeps them, with right ones of different lengths to every
question of a task.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import zstandard

from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.rollout.group_json import encode_graded
from megatron_efr.types import Grade, Graded, Group, Prompt, Response

STATUSES = ("correct", "wrong", "correct")


def write_answers(task: Path, path: Path) -> str:
    """Answers to the questions of `task`/sft.jsonl: its own response, a short wrong one, and its
    own said twice.
    """
    tokenizer = load_tokenizer(task / "model")
    lines = []
    for number, row in enumerate(map(json.loads, (task / "sft.jsonl").read_text().splitlines())):
        question, said = (
            tokenizer.encode(row[key], add_special_tokens=False) for key in ("question", "response")
        )
        texts = ([*said], said[:2], [*said, *said])
        made = [
            Response((*each, tokenizer.eos_token_id), np.zeros(len(each) + 1, np.float32), "stop")
            for each in texts
        ]
        grades = tuple(Grade(status) for status in STATUSES)
        lines.append(
            encode_graded(
                Graded(Group(Prompt(f"p{number}", tuple(question), "", "1"), tuple(made)), grades)
            )
        )
    path.write_bytes(zstandard.compress("\n".join(lines).encode()))
    return str(path)
