"""Times the embedded engine against `transformers` generate, same model, prompts and limits, one
thread, one run.

    python tools/bench/engine.py
        # a random model of the quickstart's shape
    python tools/bench/engine.py --model FOLDER --prompts FILE
        # a trained one; JSON lines with "tokens" or "text"

Two tables' worth of rows. "own lengths": responses end at the model's stop token or at
`--max-new-tokens`; `transformers` takes the prompts in their order, as many at a time as the engine
has slots, and a batch lasts as long as its longest response. The synthetic model's stop token has
about one chance in 64 at every token, so that lengths are geometric, cut at 150: mean 55 to 60, the
quickstart's own mean and longest. "equal lengths": every response has exactly `--equal-length`
tokens and nothing is wasted by either. Sides take turns and the best turn of each counts; seconds
are CPU seconds of this process, which one thread on an idle machine spends as wall time: other
programs can only slow a side down.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_efr.rollout.engine import Engine
from megatron_efr.rollout.local.engine import LocalEngine
from megatron_efr.scripts import plain
from megatron_efr.types import Prompt, Sampling

Tokens = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Timing:
    """One side's best turn; `lengths` are mean, 10%, 50%, 90% and longest of its responses, in
    tokens.
    """

    tokens: int
    seconds: float
    tokens_per_second: float
    lengths: dict[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same work done by both; `ratio` is ours over theirs in tokens per second."""

    name: str
    prompts: int
    engine: Timing
    transformers: Timing
    ratio: float


def synthetic_model(stop_id: int = 1) -> Qwen2ForCausalLM:
    """The quickstart's shape with random weights; the stop token's row is zero, so that its logit
    is always 0.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=stop_id,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[stop_id] = 0.0
    return model


def synthetic_prompts(count: int, vocab: int = 32) -> Tokens:
    """Random prompts of 8 to 20 tokens."""
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(2, vocab, rng.integers(8, 21)).tolist()) for _ in range(count)]


def read_prompts(path: str | Path, model: str | Path) -> Tokens:
    """JSON lines with `tokens`, or `text` for the model's tokenizer to read as it is."""
    rows = [
        json.loads(line)
        for line in Path(path).read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    if all("tokens" in row for row in rows):
        return [tuple(row["tokens"]) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tuple(tokenizer.encode(row["text"], add_special_tokens=False)) for row in rows]


def engine_lengths(
    engine: Engine, prompts: Tokens, limit: int, stop_ids: tuple[int, ...]
) -> list[int]:
    """Answer every prompt once with ours; the responses' lengths, in order of completion."""
    requests = (plain(Prompt(str(i), tokens, "", ""), 1, i) for i, tokens in enumerate(prompts))
    groups = engine.generate(requests, Sampling(1.0, 1.0, limit, stop_ids))
    return [group.responses[0].length for group in groups]


def transformers_lengths(
    model: PreTrainedModel,
    prompts: Tokens,
    limit: int,
    stop_ids: tuple[int, ...],
    batch: int,
) -> list[int]:
    """Answer every prompt once with `generate`, `batch` at a time in their order, padded on the
    left.
    """
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=limit, pad_token_id=0,
        eos_token_id=list(stop_ids) or None,
    )  # fmt: skip
    lengths: list[int] = []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        width = max(map(len, some))
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
        with torch.inference_mode():
            drawn: Any = model.generate(tokens, attention_mask=mask, generation_config=settings)  # type: ignore[misc]
        stops = torch.isin(drawn[:, width:], torch.tensor(stop_ids, dtype=torch.long))
        ends = torch.where(stops.any(1), stops.int().argmax(1) + 1, drawn.shape[1] - width)
        lengths += ends.tolist()
    return lengths


def measure(
    model: str | Path | None = None,
    prompts: str | Path | None = None,
    count: int = 1024,
    slots: int = 256,
    max_new_tokens: int = 150,
    equal_length: int = 56,
    turns: int = 2,
    dtype: str = "float32",
) -> list[Comparison]:
    """Both comparisons, `slots` responses at once on either side, on the first `count` prompts (the
    second on a quarter as many, at least one full batch); weights of either side have `dtype`.
    """
    # the model and its questions
    if model is None:
        theirs = synthetic_model().to(getattr(torch, dtype))
        questions = synthetic_prompts(count)
    else:
        if prompts is None:
            raise ValueError("a model of one's own needs prompts of its own: --prompts FILE")
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        questions = read_prompts(prompts, model)[:count]
    # the same weights in the engine
    engine = LocalEngine(theirs.config.to_dict(), slots, dtype=getattr(torch, dtype))
    tied = theirs.config.tie_word_embeddings
    engine.publish(
        ((n, p) for n, p in theirs.named_parameters() if not (tied and n == "lm_head.weight")),
        version=0,
    )
    stop_ids = _stop_ids(theirs)
    # what settings leave out, generate fills in from the model's own: an end, a repetition penalty
    theirs.generation_config = GenerationConfig()
    # as long as responses become, and all of one length
    fewer = questions[: max(slots, count // 4)]
    compare = partial(_compare, engine=engine, theirs=theirs, batch=slots, turns=turns)
    return [
        compare("own lengths", questions, max_new_tokens, stop_ids),
        compare(f"equal lengths ({equal_length})", fewer, equal_length, ()),
    ]


def _stop_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """generation_config's, or else config.json's."""
    for settings in (model.generation_config, model.config):
        stop: int | list[int] | None = getattr(settings, "eos_token_id", None)
        if stop is not None:
            return tuple(stop) if isinstance(stop, list) else (stop,)
    raise ValueError("the model has no eos_token_id: nothing would end a response")


def _compare(
    name: str,
    prompts: Tokens,
    limit: int,
    stop_ids: tuple[int, ...],
    *,
    engine: LocalEngine,
    theirs: PreTrainedModel,
    batch: int,
    turns: int,
) -> Comparison:
    engine_lengths(engine, prompts[:64], 4, stop_ids)  # warm both up
    transformers_lengths(theirs, prompts[:64], 4, stop_ids, batch)
    sides: list[Callable[[], list[int]]] = [
        lambda: engine_lengths(engine, prompts, limit, stop_ids),
        lambda: transformers_lengths(theirs, prompts, limit, stop_ids, batch),
    ]
    turns_taken = [[_timed(side) for side in sides] for _ in range(turns)]
    ours, others = (
        max(side, key=lambda t: t.tokens_per_second) for side in zip(*turns_taken, strict=True)
    )
    return Comparison(
        name, len(prompts), ours, others, ours.tokens_per_second / others.tokens_per_second
    )


def _timed(answer: Callable[[], list[int]]) -> Timing:
    began = time.process_time()
    lengths = answer()
    seconds = time.process_time() - began
    p10, p50, p90 = np.percentile(lengths, [10, 50, 90]).tolist()
    summary = {
        "mean": float(np.mean(lengths)),
        "p10": p10,
        "p50": p50,
        "p90": p90,
        "longest": float(max(lengths)),
    }
    return Timing(sum(lengths), seconds, sum(lengths) / seconds, summary)


def table(comparisons: list[Comparison]) -> str:
    """Markdown."""
    return "\n".join(_lines(comparisons))


def _lines(comparisons: list[Comparison]) -> Iterator[str]:
    head = (
        "lengths",
        "prompts",
        "mean tokens (10%, 50%, 90%, longest), ours / theirs",
        "engine, tokens/s",
    )
    yield f"| {' | '.join(head)} | transformers, tokens/s | ratio |"
    yield "|---|---|---|---|---|---|"
    for c in comparisons:
        both = " / ".join(
            f"{t['mean']:.1f} ({t['p10']:.0f}, {t['p50']:.0f}, {t['p90']:.0f}, {t['longest']:.0f})"
            for t in (c.engine.lengths, c.transformers.lengths)
        )
        speeds = f"{c.engine.tokens_per_second:,.0f} | {c.transformers.tokens_per_second:,.0f}"
        yield f"| {c.name} | {c.prompts:,} | {both} | {speeds} | {c.ratio:.2f}x |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # a model and its prompts
    parser.add_argument(
        "--model",
        help="a Hugging Face folder; a random model of the quickstart's shape if left out",
    )
    parser.add_argument("--prompts", help='JSON lines with "tokens" or "text"')
    parser.add_argument("--count", type=int, default=1024, help="prompts")
    parser.add_argument("--slots", type=int, default=256, help="rows the engine decodes at once")
    # responses, and how often they are asked for
    parser.add_argument("--max-new-tokens", type=int, default=150)
    parser.add_argument("--equal-length", type=int, default=56)
    parser.add_argument(
        "--turns", type=int, default=2, help="times each side runs; its best counts"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides' weights"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = vars(parser.parse_args())
    # measured on one thread, told as a table and as figures
    torch.set_num_threads(1)
    target: Path | None = arguments.pop("json")
    comparisons = measure(**arguments)
    figures = json.dumps([asdict(comparison) for comparison in comparisons], indent=2)
    print(table(comparisons), figures, sep="\n\n")
    if target is not None:
        target.write_text(figures + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
