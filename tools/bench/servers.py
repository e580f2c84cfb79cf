"""Times the embedded engine against a real SGLang server on this machine's CPU: the same model,
prompts and limits.

    python tools/bench/servers.py --model FOLDER --prompts FILE
        # JSON lines with "tokens" or "text"

Rows as engine.py has them: responses that end by themselves, and responses of one length. Sides
take turns, after one turn that is not counted; the best of each counts. Seconds are wall time, so
nothing else may run. Both have one thread for products; the server's other processes take a core of
their own beside it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from engine import Tokens, engine_lengths, read_prompts
from turns import ROOT

from megatron_efr.config import ModelConfig
from megatron_efr.config.rollout import EnginesConfig
from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.data.stop_tokens import stop_ids
from megatron_efr.rollout.build import open_engine
from megatron_efr.rollout.codec import NoText
from megatron_efr.rollout.engine import Engine
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights


def measure(given: argparse.Namespace) -> list[str]:
    """Rows of the table."""
    prompts = read_prompts(given.prompts, given.model)[: given.count]
    stops = stop_ids(given.model, load_tokenizer(given.model))
    cases = {
        "own lengths": (prompts, given.max_new_tokens, stops),
        f"{given.equal_length} tokens each": (prompts[: given.slots], given.equal_length, ()),
    }
    with ExitStack() as resources:
        logs = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        engines = [opened(given, kind, logs, resources) for kind in ("local", "sglang")]
        return [compared(name, engines, given.turns, *case) for name, case in cases.items()]


def opened(given: argparse.Namespace, kind: str, logs: Path, resources: ExitStack) -> Engine:
    """An engine with the folder's weights; a server if `kind` is sglang."""
    model = ModelConfig(path=given.model, dtype=given.dtype)
    architecture = Architecture.from_folder(given.model)
    # a server would answer a prompt's second turn from its cache
    server = {"server": {"disable_radix_cache": True}} if kind == "sglang" else {}
    engines = EnginesConfig.model_validate(
        {"engine": kind, "slots": given.slots, "python": given.python} | server
    )
    engine = open_engine(model, architecture, engines, logs, 0, NoText(), resources)
    engine.publish(FolderWeights(given.model, architecture).items(), 0)
    return engine


def compared(
    name: str,
    engines: list[Engine],
    turns: int,
    prompts: Tokens,
    limit: int,
    stops: tuple[int, ...],
) -> str:
    """One row: tokens per second of both, and their ratio."""
    rates: list[list[float]] = [[], []]
    means = []
    for turn in range(turns + 1):
        means = []
        for engine, taken in zip(engines, rates, strict=True):
            began = time.perf_counter()
            lengths = engine_lengths(engine, prompts, limit, stops)
            if turn:  # the first warms up
                taken.append(sum(lengths) / (time.perf_counter() - began))
            means.append(float(np.mean(lengths)))
    ours, theirs = (max(taken) for taken in rates)
    lengths = " / ".join(f"{mean:.1f}" for mean in means)
    return (
        f"| {name}, {len(prompts)} prompts | {lengths} | {ours:,.0f} | {theirs:,.0f} "
        f"| {ours / theirs:.2f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--prompts", required=True, help='JSON lines with "tokens" or "text"')
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--slots", type=int, default=64, help="responses at once")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--equal-length", type=int, default=56)
    parser.add_argument("--turns", type=int, default=2, help="that count")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides' weights"
    )
    parser.add_argument(
        "--python",
        default=str(ROOT / ".venv-sglang/bin/python"),
        help="the interpreter with SGLang",
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| | mean tokens, ours / SGLang's | ours, tokens/s | SGLang, tokens/s | ratio |")
    print("\n".join(["|---|---|---:|---:|---:|", *measure(given)]))


if __name__ == "__main__":
    main()
