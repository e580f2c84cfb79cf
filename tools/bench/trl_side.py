"""The TRL side of cpu.py: GRPOTrainer on the same task; every line on its input starts one
iteration.

Run by cpu.py, in an environment that has trl. An iteration is one generation of all rollouts, old
and reference log-probs, and the updates: TRL's `steps_per_generation`. Reward: the last box, or the
last number, is the gold answer's very text, which costs less than grading. Of TRL's defaults,
gradient checkpointing is off, and bf16 is on where our side's weights are bfloat16.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
from turns import ANSWER, peak_mib


class Turns(TrainerCallback):
    """Waits for a line before each iteration of so many steps, and reports it after."""

    def __init__(self, steps: int) -> None:
        self.steps, self.lengths, self.right, self.began = steps, [], [], 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            if not sys.stdin.readline():
                raise SystemExit(0)
            self.lengths, self.right = [], []
            self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            seconds = time.perf_counter() - self.began
            report = {
                "seconds": seconds,
                "lengths": self.lengths,
                "accuracy": sum(self.right) / len(self.right),
                "memory_mib": peak_mib(),
            }
            print(ANSWER + json.dumps(report), flush=True)

    def reward(
        self, prompts: Any, completions: list[str], completion_ids: Any, answer: list[str], **_: Any
    ) -> Any:
        """1 if the answer is the gold one; notes the lengths."""
        self.lengths += [len(ids) for ids in completion_ids]
        right = [
            float(answer_of(text) == gold) for text, gold in zip(completions, answer, strict=True)
        ]
        self.right += right
        return right


def answer_of(text: str) -> str | None:
    """The content of the last \\boxed{}, for answers without braces; without a box the last
    number.
    """
    _, box, rest = text.rpartition("\\boxed{")
    if box:
        return rest.partition("}")[0].strip() if "}" in rest else None
    return next(iter(re.findall(r"\d+", text)[-1:]), None)


def trainer(given: argparse.Namespace, turns: Turns, scratch: Path) -> GRPOTrainer:
    """GRPO with the configuration's beta, one mean per response, no division by the rewards'
    deviation.
    """
    # the same tokens as the engine's
    rows = [json.loads(line) for line in given.prompts.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    for row in rows:
        if tokenizer(row["text"])["input_ids"] != row["tokens"]:
            raise SystemExit(f"TRL would read {row['text']!r} as other tokens than the engine does")
    # an update's responses at once, or in parts
    each = given.rollouts // given.updates
    batch = max(n for n in range(1, given.batch + 1) if each % n == 0)
    parts = each // batch
    config = GRPOConfig(
        output_dir=str(scratch), use_cpu=True, gradient_checkpointing=False, report_to="none",
        bf16=given.dtype == "bfloat16",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=1, shuffle_dataset=False,
        model_init_kwargs={"dtype": "float32"},  # autocast's products are bfloat16, if asked for
        per_device_train_batch_size=batch, gradient_accumulation_steps=parts,
        steps_per_generation=given.updates * parts,
        num_generations=given.samples,
        max_completion_length=given.max_new_tokens, max_steps=given.updates * given.iterations,
        temperature=1.0, top_p=1.0, top_k=0, beta=given.beta, loss_type="grpo",
        scale_rewards="none", epsilon=0.2,
        learning_rate=given.lr, lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0,
        adam_beta2=0.95,
    )  # fmt: skip
    # the prompts in their order
    data = Dataset.from_list([{"prompt": row["text"], "answer": row["answer"]} for row in rows])
    return GRPOTrainer(
        given.model, reward_funcs=turns.reward, args=config, train_dataset=data,
        processing_class=tokenizer,
        callbacks=[turns],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--prompts", type=Path, required=True, help='JSON lines of "text", "tokens", "answer"'
    )
    parser.add_argument("--scratch", type=Path, required=True)
    for name in ("rollouts", "samples", "updates", "iterations", "max-new-tokens", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    for name in ("beta", "lr"):
        parser.add_argument(f"--{name}", type=float, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trainer(given, Turns(given.updates), given.scratch).train()


if __name__ == "__main__":
    main()
