"""`efr evaluate`: accuracy and tokens of a model folder on held-out problems, answered by the embedded engine."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_efr import arguments
from megatron_efr.config import EvaluateConfig
from megatron_efr.data.prompts import load_tokenizer, stop_ids
from megatron_efr.environment import Evaluator
from megatron_efr.grading import Grader
from megatron_efr.report.records import Record
from megatron_efr.rollout.build import local_engine
from megatron_efr.runfolder import RunFolder
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import initial_weights


def evaluate(config: EvaluateConfig, record_name: str) -> Record:
    """Answer and grade every problem; the record is kept as eval/<record_name>.json of the run folder."""
    folder = RunFolder(config.folder)
    folder.evaluation_path(record_name)  # a name that cannot be a file's is refused before any work
    tokenizer = load_tokenizer(config.model.path)
    architecture = Architecture.from_folder(config.model.path)
    weights = initial_weights(config.model, architecture, config.seed)
    stops = stop_ids(config.model.path, tokenizer)
    evaluator = Evaluator(config.evaluation, config.prompt, tokenizer, stops, config.seed)
    engine = local_engine(config.model.path, config.slots, config.model.dtype)
    engine.publish(weights.items(), version=0)
    with Grader(config.grading.workers, config.grading.timeout_s) as grader:
        record = evaluator.run(engine, grader, record_name, progress=True)
    folder.write_evaluation(record_name, record)
    return record


def describe(record: Record) -> str:
    """The figures of every data set, a line each."""
    lines = [f"{record['name']}:"]
    for dataset, figures in record["datasets"].items():
        low, high = figures["accuracy_ci"]
        lines.append(
            f"  {dataset}: accuracy {figures['accuracy']:.1%} [{low:.1%}, {high:.1%}], "
            f"{figures['tokens']:.1f} tokens, {figures['truncated']:.1%} cut off, "
            f"{figures['samples']} responses to {figures['problems']} problems"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr evaluate`."""
    parser = arguments.parser("evaluate", "Accuracy and tokens of a model folder on held-out problems.")
    parser.add_argument("--record", default="model", help="name of the record: eval/RECORD.json in the run folder")
    given = parser.parse_args(argv)
    print(describe(evaluate(arguments.read(EvaluateConfig, given), given.record)), flush=True)


if __name__ == "__main__":
    arguments.run(main)
