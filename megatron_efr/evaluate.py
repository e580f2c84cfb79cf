"""`efr evaluate`: accuracy and tokens of a model on held-out problems, from a folder or a
checkpoint, on any engine.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_efr import arguments, log
from megatron_efr.checkpoint.model_source import ModelSource, find_model
from megatron_efr.config import EvaluateConfig
from megatron_efr.data.prompts import load_tokenizer
from megatron_efr.data.stop_tokens import stop_ids
from megatron_efr.data.thinking import thinking_marks
from megatron_efr.errors import EngineError, UserError
from megatron_efr.evaluation.evaluator import Evaluator
from megatron_efr.evaluation.journal import ASKED, Unfinished, finished, forget
from megatron_efr.evaluation.records import Record, describe
from megatron_efr.grading import Grader
from megatron_efr.rollout.build import open_engine
from megatron_efr.rollout.codec import TokenizerCodec
from megatron_efr.rollout.engine import Engine
from megatron_efr.rollout.ledger import request_seed
from megatron_efr.rollout.recovery import ask_with_recovery, take_in_returned
from megatron_efr.rollout.servers.arguments import check_server_arguments
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.run.folder import RunFolder
from megatron_efr.run.main_rank import date_prompts
from megatron_efr.run.owner import owned
from megatron_efr.weights.folder import TensorSource, as_folder


def evaluate(config: EvaluateConfig, record_name: str, replace: bool = False) -> Record:
    """Answer and grade every problem; the record is kept as eval/<record_name>.json of the run
    folder.

    Answered problems are journalled there: an evaluation that was killed goes on from there. One
    that is finished is not made again; the record of another under this name is refused, or written
    over if it is to `replace`.
    """
    folder = RunFolder(config.folder)
    # a name that cannot be a file's is refused before any work
    path = folder.evaluation_path(record_name)
    check_server_arguments(config.rollout)
    # the model and everything that decides what is asked of it
    source = find_model(config.model, config.seed, config.template)
    tokenizer = load_tokenizer(source.start.path, source.architecture.raw)
    weights = source.weights()
    evaluator = _evaluator(config, source, tokenizer, folder)
    asked = {
        "model": source.fingerprint(),
        "model.dtype": config.model.dtype,
        "rollout.engine": config.rollout.engine,
        **evaluator.asked(),
    }
    # one process owns the record; one that is finished is not made again
    with ExitStack() as resources:
        resources.enter_context(
            owned(folder.evaluation_lock(record_name), f"{folder.path}: evaluation {record_name}")
        )
        judged = {**asked, **evaluator.judged()}  # what grades depend on besides
        if (kept := finished(path, judged, replace)) is not None:
            print(f"{path}: holds this evaluation already; delete it to evaluate again", flush=True)
            forget(path, asked)
            return kept
        unfinished = Unfinished(path, asked, replace)
        resources.enter_context(log.kept(folder.log, f"evaluation {record_name}"))
        # graders, engine, and the weights published to it
        grader = resources.enter_context(Grader.of(config.grading, evaluator.judgings.verifiers))
        # servers begin their random numbers anew: not with those that the journal's answers were
        # drawn with
        seed = request_seed(config.seed, len(unfinished.journal.read().groups))
        logs = folder.path / "engines" / f"eval-{record_name}"
        codec = TokenizerCodec(tokenizer)
        engine = _open_engine(config, source, codec, evaluator, logs, seed, resources)
        publish = _publication(config, source, weights, engine, logs / "weights", resources)
        take_in = take_in_returned(engine, publish)

        def ask() -> Record:
            keep = (
                partial(folder.write_answers, record_name)
                if config.evaluation.keep
                else lambda graded: None
            )
            return evaluator.run(engine, grader, record_name, unfinished.journal, take_in, keep)

        # ask and grade, taking servers in again that come back; keep the record
        try:
            record = ask_with_recovery(publish, ask)
        except EngineError as error:
            raise UserError(
                f"{error}; the same command goes on from {unfinished.journal.path}"
            ) from error
        folder.write_evaluation(record_name, record | {ASKED: judged})
        unfinished.clear()
    return record


def _evaluator(
    config: EvaluateConfig,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
) -> Evaluator:
    """The evaluator of the configured problems, for the tokenizer and config.json of `source`."""
    stops = stop_ids(source.start.path, tokenizer, source.architecture.raw)
    date_prompts(config.prompt, folder)
    positions = source.architecture.max_positions
    marks = thinking_marks(config.model.thinking, tokenizer)
    asking = config.evaluation, config.prompt, config.grading
    return Evaluator(*asking, tokenizer, stops, positions, config.seed, marks)


def _open_engine(
    config: EvaluateConfig,
    source: ModelSource,
    codec: TokenizerCodec,
    evaluator: Evaluator,
    logs: Path,
    seed: int,
    resources: ExitStack,
) -> Engine:
    """The configured engine, without weights; `resources` close it."""
    shape = source.start, source.architecture
    penalties = bool(evaluator.script.penalised)
    return open_engine(*shape, config.rollout, logs, seed, codec, resources, penalties=penalties)


def _publication(
    config: EvaluateConfig,
    source: ModelSource,
    weights: TensorSource,
    engine: Engine,
    place: Path,
    resources: ExitStack,
) -> Callable[[], None]:
    """Make a function that gives the engine the weights.

    Servers read them from a folder: for a checkpoint's, one written to `place`, with all else from
    the model that it began with, that `resources` remove.
    """
    if config.rollout.transport == "tensor" or not isinstance(engine, SGLangEngine):
        return lambda: engine.publish(weights.items(), version=0)
    folder = as_folder(weights, place, source.start.path)
    resources.callback(shutil.rmtree, place, ignore_errors=True)
    return lambda: engine.publish_folder(folder, version=0)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr evaluate`."""
    parser = arguments.parser("evaluate", "Accuracy and tokens of a model on held-out problems.")
    parser.add_argument(
        "--engine", choices=["local", "sglang"], help="the same as rollout.engine=..."
    )
    parser.add_argument(
        "--record", default="model", help="name of the record: eval/RECORD.json in the run folder"
    )
    parser.add_argument(
        "--replace", action="store_true", help="write over the record of another evaluation"
    )
    given = parser.parse_intermixed_args(argv)
    if given.engine:
        given.overrides.append(f"rollout.engine={given.engine}")
    with arguments.configured(EvaluateConfig, given) as config:
        print(describe(evaluate(config, given.record, given.replace)), flush=True)


if __name__ == "__main__":
    arguments.run(main)
