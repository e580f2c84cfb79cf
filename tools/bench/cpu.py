"""Times megatron_efr on the CPU, one thread, each figure beside what it replaces, measured in turns
in one run.

    python tools/bench/cpu.py
        # after `bash launch/quickstart.sh`: its model, its task
    python tools/bench/cpu.py --trl-python FOLDER/bin/python   # with TRL's row
    python tools/bench/cpu.py --model FOLDER --train FILE --config examples/real_model/rl.yaml
        --slots 64 --prompts 256 --sizes 576x30 --tokens 2048 --steps 1 --turns 2
        --micro-batch 4096 model.lora=null model.dtype=bfloat16 rollout.samples=8
        # another model, and the iteration of another configuration
    python tools/bench/cpu.py --quick
        # a smoke run: the figures mean nothing

Rows: the engine against `transformers` generate (see engine.py); a policy step (`Policy.update`:
forward, backward, clip and Adam through Megatron's schedule, DDP and optimizer) against the same
model in plain torch on the same packed batch; one iteration of the configuration (rollouts,
grading, log-probs, updates, publication) against TRL's GRPOTrainer. Sides of a row run in processes
of their own and take turns; while one works the other waits. A figure is the median over turns, and
a ratio the median of the turns' own ratios; of the engine each side's best turn counts, in CPU
seconds of this process. Before a policy step is timed, loss and gradients of both sides must agree.

TRL wants an environment of its own that sees this one's torch and transformers:

    python -m venv FOLDER
    ls -d $PWD/.venv/lib/python3.*/site-packages > $(ls -d
        FOLDER/lib/python3.*/site-packages)/shared.pth
    FOLDER/bin/pip install trl==1.16.0
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from options import arguments, settings_from
from table import Row, phases, table
from turns import Settings, Side, take_turns

from megatron_efr.config import TrainConfig

# of the loss; of a tensor's gradient, or of all gradients if that is more: what 30 layers round. In
# bfloat16 ratios fall on other sides of the clip: a norm's gradient was off float32's by half.
TOLERANCES = {"float32": (1e-5, 1e-3, 1e-5), "bfloat16": (1e-3, 0.1, 0.5)}


# -- rows
# --------------------------------------------------------------------------------------------------


def side(name: str, settings: Settings, folder: Path) -> Side:
    """One of sides.py's as a process."""
    (folder / "settings.json").write_text(json.dumps(asdict(settings)))
    return Side(
        [sys.executable, str(Path(__file__).resolve().with_name("sides.py")), name, str(folder)]
    )


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def engine_rows(
    settings: Settings, config: TrainConfig, rows: list[dict[str, Any]], folder: Path
) -> list[Row]:
    """engine.py's comparisons on the task's own prompts."""
    # imported here, since the other rows need neither engine
    from engine import measure

    prompts = folder / "prompts.jsonl"
    # the task's prompts as often as it takes to fill the rows
    repeated = [rows[i % len(rows)] for i in range(settings.engine_prompts)]
    prompts.write_text("".join(json.dumps({"tokens": row["tokens"]}) + "\n" for row in repeated))
    comparisons = measure(
        settings.model,
        prompts,
        settings.engine_prompts,
        settings.slots,
        max_new_tokens=config.rollout.max_new_tokens,
        turns=settings.engine_turns,
        dtype=config.model.dtype,
    )
    # a row for each comparison, against its goal
    made = []
    for comparison, goal in zip(comparisons, (">= 2.5x", ">= 1.2x"), strict=True):
        engine, theirs = comparison.engine, comparison.transformers
        name = (
            f"engine against transformers.generate, {comparison.name}, {comparison.prompts:,} "
            "prompts"
        )
        # lengths beside the rates: a model that stops early would look fast
        lengths = (
            f"{engine.lengths['mean']:.1f} / {theirs.lengths['mean']:.1f} (longest "
            f"{engine.lengths['longest']:.0f})"
        )
        made.append(
            Row(
                name,
                "tokens/s",
                engine.tokens_per_second,
                theirs.tokens_per_second,
                comparison.ratio,
                goal,
                lengths,
            )
        )
    return made


def sampled_sequences(
    settings: Settings, limit: int, rows: list[dict[str, Any]]
) -> list[list[Any]]:
    """Responses of the model itself, shuffled, until they make up `step_tokens`: [tokens, prompt
    length, advantage].
    """
    import numpy as np

    from megatron_efr.rollout.local.engine import LocalEngine
    from megatron_efr.scripts import plain
    from megatron_efr.types import Prompt, Sampling
    from megatron_efr.weights.architecture import Architecture
    from megatron_efr.weights.folder import FolderWeights

    # responses that the model itself draws: their lengths are those of training
    architecture = Architecture.from_folder(settings.model)
    engine = LocalEngine(settings.model, settings.slots)
    engine.publish(FolderWeights(settings.model, architecture).items(), 0)
    stops = tuple(rows[0]["stops"])
    requests = [
        plain(Prompt(str(i), tuple(row["tokens"]), "", ""), 8, i) for i, row in enumerate(rows[:64])
    ]
    groups = engine.generate(requests, Sampling(1.0, 1.0, limit, stops))
    # by the prompts' seeds, since groups come in the order in which they ended
    drawn = [
        (list(g.prompt.tokens), list(r.tokens))
        for g in sorted(groups, key=lambda g: g.seed)
        for r in g.responses
    ]
    # any order will do, if it is the same for both sides
    rng, chosen, total = np.random.default_rng(0), [], 0
    for i in rng.permutation(len(drawn)).tolist():
        if total >= settings.step_tokens:
            break
        prompt, response = drawn[i]
        chosen.append([prompt + response, len(prompt), float(rng.normal())])
        total += len(prompt) + len(response)
    return chosen


def step_row(
    settings: Settings, dtype: str, sequences: list[list[Any]], size: tuple[int, int], folder: Path
) -> Row:
    """A policy step at one size, of weights of `dtype`; the model's own weights if it has that
    size, random ones elsewhere.
    """
    import torch

    hidden, layers = size
    config = json.loads((Path(settings.model) / "config.json").read_text())
    given: dict[str, Any] = {"sequences": sequences, "model": settings.model, "init": "load"}
    given |= {"dtype": dtype, "micro_batch_tokens": settings.step_micro_batch}
    # another size than the model's is drawn at random
    if (config["hidden_size"], config["num_hidden_layers"]) != size:
        config |= {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "intermediate_size": 3 * hidden,
        }
        if config.get("layer_types"):
            config["layer_types"] = ["full_attention"] * layers
        config.pop("head_dim", None)  # the model's own
        (folder / "config.json").write_text(json.dumps(config))
        given |= {"model": str(folder), "init": "random"}
    (folder / "sequences.json").write_text(json.dumps(given))
    ours = side("policy", settings, folder)
    # both sides agree before they are timed
    first = ours.turn()
    theirs = side("plain", settings, folder)
    try:
        check_agreement(
            first["loss"],
            theirs.turn()["loss"],
            torch.load(folder / "ours.pt"),
            torch.load(folder / "theirs.pt"),
            dtype,
        )
        taken = take_turns(ours, theirs, settings.step_turns + 1)[1:]  # the first warms both up
    finally:
        ours.close()
        theirs.close()
    # the row: medians of alternating turns
    tokens = sum(len(row[0]) for row in sequences)
    mean = sum(len(row[0]) - row[1] for row in sequences) / len(sequences)
    return Row(
        f"policy step against plain torch, {hidden} x {layers} layers, {tokens:,} tokens, "
        f"{len(sequences)} sequences",
        "ms",
        1e3 * median(a["seconds"] for a, _ in taken),
        1e3 * median(b["seconds"] for _, b in taken),
        median(a["seconds"] / b["seconds"] for a, b in taken),
        "<= 0.85x",
        f"{mean:.1f}",
        taken[-1][0]["memory_mib"],
        taken[-1][1]["memory_mib"],
    )


def check_agreement(
    loss: float, other_loss: float, gradients: dict[str, Any], others: dict[str, Any], dtype: str
) -> None:
    """RuntimeError unless both sides computed the same loss and gradients (after clipping), within
    what weights of `dtype` round.
    """
    loss_tolerance, of_its_own, of_all = TOLERANCES[dtype]
    if abs(loss - other_loss) > loss_tolerance:
        raise RuntimeError(
            f"the policy's loss is {loss}, plain torch's is {other_loss}: nothing to compare"
        )
    if gradients.keys() != others.keys():
        raise RuntimeError(
            f"gradients of other parameters: {sorted(gradients.keys() ^ others.keys())}"
        )
    whole = sum(float(other.norm()) ** 2 for other in others.values()) ** 0.5
    for name, other in others.items():
        # a tensor whose gradient is next to nothing (a key's bias has none in theory) is held
        # against all of them
        limit = max(of_its_own * float(other.norm()), of_all * whole)
        if float((gradients[name] - other).norm()) > limit:
            raise RuntimeError(
                f"the gradient of {name} differs from plain torch's by more than {limit:.1e}"
            )


def iteration_row(
    settings: Settings, config: TrainConfig, rows: list[dict[str, Any]], folder: Path
) -> Row:
    """One iteration against TRL's; without an interpreter that has trl, ours alone."""
    # what is compared, told with its sizes
    turns, ours = settings.iteration_turns, side("iteration", settings, folder)
    prompts, samples = config.rollout.prompts, config.rollout.samples
    name = (
        f"iteration against TRL's GRPOTrainer, {prompts * samples} rollouts ({prompts} x "
        f"{samples}), {config.train.updates} updates"
    )
    try:
        ours.turn()  # the first iteration starts things up
        if settings.trl_python is None:
            alone = [ours.turn() for _ in range(turns)]
            note = (
                "TRL not measured: give --trl-python an interpreter that has trl (--help says how "
                "to make one)"
            )
            return _ours_alone(name, alone, note)
        # alternating turns
        theirs = trl_side(settings, config, rows, folder)
        try:
            theirs.turn()
            taken = take_turns(ours, theirs, turns)
        finally:
            theirs.close()
    finally:
        ours.close()
    # responses must be of like length for the times to compare
    lengths = [
        statistics.fmean(length for answer in answers for length in answer["lengths"])
        for answers in zip(*taken, strict=True)
    ]
    return Row(
        name,
        "s",
        median(a["seconds"] for a, _ in taken),
        median(b["seconds"] for _, b in taken),
        median(b["seconds"] / a["seconds"] for a, b in taken),
        "TRL >= 2.5x slower",
        f"{lengths[0]:.1f} / {lengths[1]:.1f}",
        taken[-1][0]["memory_mib"],
        taken[-1][1]["memory_mib"],
        phases(a for a, _ in taken),
    )


def _ours_alone(name: str, answers: list[dict[str, Any]], note: str) -> Row:
    lengths = statistics.fmean(length for answer in answers for length in answer["lengths"])
    return Row(
        name,
        "s",
        median(answer["seconds"] for answer in answers),
        None,
        None,
        "TRL >= 2.5x slower",
        f"{lengths:.1f}",
        answers[-1]["memory_mib"],
        None,
        f"{phases(answers)}; {note}",
    )


def trl_side(
    settings: Settings, config: TrainConfig, rows: list[dict[str, Any]], folder: Path
) -> Side:
    """trl_side.py, with the prompts in the order in which ours takes them."""
    assert settings.trl_python is not None
    prompts, turns = folder / "trl.jsonl", settings.iteration_turns + 1
    needed = (rows[i % len(rows)] for i in range(turns * config.rollout.prompts))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in needed))
    options = {
        "model": settings.model,
        "prompts": prompts,
        "scratch": folder / "trl",
        "rollouts": config.rollout.prompts * config.rollout.samples,
        "samples": config.rollout.samples,
        "updates": config.train.updates,
        "iterations": turns,
        "max-new-tokens": config.rollout.max_new_tokens,
        "batch": settings.trl_batch,
        "dtype": config.model.dtype,
        "beta": getattr(config.algorithm, "beta", 0.0),
        "lr": config.optimizer.lr,
    }
    script = str(Path(__file__).resolve().with_name("trl_side.py"))
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return Side([settings.trl_python, script, *given])


def task_rows(settings: Settings, config: TrainConfig) -> list[dict[str, Any]]:
    """The training prompts in the order of the run's stream: their text, tokens, answer, and what
    ends a response.
    """
    from megatron_efr.data.prompts import load_tokenizer
    from megatron_efr.data.stop_tokens import stop_ids
    from megatron_efr.data.stream import PromptStream
    from megatron_efr.evaluation.problems import load_prompts

    tokenizer = load_tokenizer(settings.model)
    stream = PromptStream(
        load_prompts(config.data.datasets, tokenizer, config.data.prompt).prompts, config.seed
    )
    stops = stop_ids(settings.model, tokenizer)
    count = max(settings.engine_prompts, config.rollout.prompts * (settings.iteration_turns + 1))
    prompts = [visit.prompt for visit in stream.take(min(count, len(stream)))]
    return [
        {"text": p.text, "tokens": list(p.tokens), "answer": p.gold, "stops": stops}
        for p in prompts
    ]


def measure(settings: Settings) -> Iterator[Row]:
    """Every row, one after the other; says on stderr which one is under way."""
    from sides import configuration

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = configuration(settings, folder, 1)
        rows = task_rows(settings, config)
        if "engine" in settings.rows:
            say("engine")
            yield from engine_rows(settings, config, rows, folder)
        if "step" in settings.rows:
            sequences = sampled_sequences(settings, config.rollout.max_new_tokens, rows)
            for size in settings.step_sizes:
                say(f"policy step, hidden {size[0]} x {size[1]} layers")
                place = folder / f"step-{size[0]}x{size[1]}"
                place.mkdir()
                yield step_row(settings, config.model.dtype, sequences, size, place)
        if "iteration" in settings.rows:
            say("iteration")
            yield iteration_row(settings, config, rows, folder)


def say(text: str) -> None:
    print(f"measuring: {text}", file=sys.stderr, flush=True)


# -- command line
# --------------------------------------------------------------------------------------------------


def main() -> None:
    given = arguments(__doc__)
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # read when numpy and torch are loaded, so it must stand before: start over with it
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    import torch

    torch.set_num_threads(1)
    rows: list[Row] = []
    for row in measure(settings_from(given)):  # told at once, since a later one may fail
        rows.append(row)
        print(table([row]), file=sys.stderr, flush=True)
    print(table(rows))
    if given.json is not None:
        given.json.write_text(
            json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
