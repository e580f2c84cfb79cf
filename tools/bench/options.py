"""The command line of cpu.py, and the measurements that it asks for."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from turns import ROOT, ROWS, Settings

HINT = (
    "run `bash launch/quickstart.sh` first (its warm start is enough), or name a folder and "
    "prompts of your own"
)


def refuse(given: argparse.Namespace) -> None:
    """A SystemExit that says what is missing, or which size the model cannot have."""
    # what is missing
    if not (Path(given.model) / "config.json").is_file():
        raise SystemExit(
            f"--model {given.model}: no model folder there (config.json is missing); {HINT}"
        )
    if not Path(given.train).is_file():
        raise SystemExit(f"--train {given.train}: no such file of problems; {HINT}")
    if given.trl_python is not None and not Path(given.trl_python).is_file():
        raise SystemExit(
            f"--trl-python {given.trl_python}: no such interpreter; --help says how to make one"
        )
    # heads that do not divide a size
    heads = json.loads((Path(given.model) / "config.json").read_text()).get(
        "num_attention_heads", 1
    )
    for hidden, layers in sizes_of(given) if "step" in given.rows else ():
        if hidden % heads:
            raise SystemExit(
                f"--sizes {hidden}x{layers}: the model's {heads} heads do not divide {hidden}"
            )


def sizes_of(given: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    """Hidden sizes and layers of the policy steps."""
    return ((64, 3),) if given.quick else tuple(given.sizes)


def settings_from(given: argparse.Namespace) -> Settings:
    """Settings, or a SystemExit that says what is missing."""
    refuse(given)
    model, train = str(Path(given.model).resolve()), str(Path(given.train).resolve())
    # not resolved: an environment's interpreter is a link, and the link is what makes it that
    # environment's
    trl_python = None if given.trl_python is None else os.path.abspath(given.trl_python)
    settings = Settings(
        model,
        train,
        given.config,
        tuple(given.overrides),
        trl_python,
        given.trl_batch,
        tuple(given.rows),
        given.slots,
        given.prompts,
        step_tokens=given.tokens,
        step_micro_batch=given.micro_batch,
        step_sizes=sizes_of(given),
        step_turns=2 * given.turns + 1,  # they are shorter
        steps_per_turn=given.steps,
        iteration_turns=given.turns,
    )
    if not given.quick:
        return settings
    # sizes that take seconds
    small = ("rollout.prompts=4", "rollout.samples=2", "rollout.max_new_tokens=60")
    return replace(
        settings,
        overrides=(*small, *settings.overrides),
        engine_prompts=32,
        engine_turns=1,
        step_tokens=512,
        step_turns=2,
        steps_per_turn=1,
        iteration_turns=2,
    )


def size(text: str) -> tuple[int, int]:
    """Hidden size and layers of `HIDDENxLAYERS`."""
    hidden, _, layers = text.partition("x")
    return int(hidden), int(layers)


def arguments(description: str | None) -> argparse.Namespace:
    """The command line, as it was given."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # a model, its task, and TRL
    parser.add_argument(
        "--model", default="runs/quickstart/sft/model", help="a Hugging Face folder with weights"
    )
    parser.add_argument("--train", default="runs/quickstart/task/train.jsonl", help="its problems")
    parser.add_argument(
        "--trl-python", help="an interpreter that has trl; without it that row says so"
    )
    # another iteration
    parser.add_argument("overrides", nargs="*", help="over the configuration: KEY=VALUE ...")
    parser.add_argument(
        "--config", default=str(ROOT / "examples/quickstart/rl.yaml"), help="a run's, to be timed"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="default: all")
    # other sizes
    parser.add_argument("--slots", type=int, default=256, help="responses decoded at once")
    parser.add_argument("--prompts", type=int, default=1024, help="that the engines answer")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=size,
        default=((64, 3), (128, 4)),
        metavar="HIDDENxLAYERS",
        help="of the policy steps (default: 64x3 128x4)",
    )
    # how much is measured, and how often
    parser.add_argument("--tokens", type=int, default=8192, help="of a policy step")
    parser.add_argument(
        "--micro-batch", type=int, default=16384, help="most tokens of a pass of a policy step"
    )
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument(
        "--turns", type=int, default=4, help="of an iteration; of steps twice as many"
    )
    parser.add_argument(
        "--trl-batch", type=int, default=128, help="responses in one pass of TRL's, for its memory"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    return parser.parse_intermixed_args()
