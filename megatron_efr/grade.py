"""`efr grade`: judges a file of responses, says how each was judged and why, and on what verifiers
disagree.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
import zstandard

from megatron_efr import arguments
from megatron_efr.config import ConfigError, GradingConfig, TrainConfig
from megatron_efr.config.file import load, validate
from megatron_efr.data.datasets import dataset_name
from megatron_efr.data.readers import DatasetError, read_rows
from megatron_efr.grading import Grade, Grader
from megatron_efr.grading.judging import Judging, Judgings, Part
from megatron_efr.grading.verdict import STATUSES, UNJUDGED, Question, Verifier

EXIT_UNJUDGED = 1
_GOLD = ("gold", "answer", "final_answer", "target")
_RESPONSE = ("response", "completion", "output", "prediction", "text")
_SHOWN = 60  # characters of an answer or a gold on a line
_WHY = {
    "no_answer": "the response has none where it is looked for",
    "unparsed": "the verifier cannot read the answer",
    "bad_gold": "the verifier cannot read the gold",
}
_CUT_OFF = Grade("truncated", reason="cut off before its end, hence wrong")


@dataclass(frozen=True, slots=True)
class Entry:
    """One response of the file. `cut` says that it did not end by itself, `recorded` how it was
    judged then.
    """

    where: str
    response: str
    gold: str
    dataset: str | None = None
    cut: bool = False
    recorded: str | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A response and each verifier's grade, by the verifier's name; the first decides."""

    entry: Entry
    grades: dict[str, Grade]

    @property
    def disagreement(self) -> str:
        """The line on how verifiers, and the record, differ on it; empty if they agree."""
        said = {name: grade.status for name, grade in self.grades.items()}
        if self.entry.recorded is not None:
            said = {"recorded": self.entry.recorded, **said}
        if len({status == "correct" for status in said.values()}) < 2:
            return ""
        return f"{self.entry.where}: " + ", ".join(
            f"{name} {status}" for name, status in said.items()
        )

    def lines(self) -> Iterator[str]:
        """One line for each verifier."""
        for name, grade in self.grades.items():
            answer = "no answer" if grade.answer is None else f"answer {_short(grade.answer)}"
            why = grade.reason or _WHY.get(grade.status, "")
            reason = f"  ({why})" if why else ""
            score = "" if grade.partial is None else f" {grade.partial:.3g}"
            yield (
                f"{self.entry.where}  {name}  {grade.status}{score}  {answer}  gold "
                f"{_short(self.entry.gold)}{reason}"
            )

    def tree(self) -> dict[str, Any]:
        """The same for programs to read."""
        verdicts = {
            name: {"status": g.status, "score": g.score, "answer": g.answer, "reason": g.reason}
            for name, g in self.grades.items()
        }
        return {
            "where": self.entry.where,
            "gold": self.entry.gold,
            "recorded": self.entry.recorded,
            "verdicts": verdicts,
        }


def read_entries(path: str, gold_key: str | None, response_key: str | None) -> list[Entry]:
    """The responses of JSON lines, JSON, parquet, or a run's rollouts; DatasetError names a row
    that has none.
    """
    rows = (
        _compressed_rows(path)
        if path.endswith(".zst")
        else ((row.where, row.columns) for row in read_rows(path))
    )
    entries = [
        entry for where, row in rows for entry in _entries(where, row, gold_key, response_key)
    ]
    if not entries:
        raise DatasetError(f"{path}: holds no responses")
    return entries


def _compressed_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = zstandard.ZstdDecompressor().decompress(Path(path).read_bytes())
        for number, line in enumerate(filter(None, text.split(b"\n")), start=1):
            yield f"{path}:{number}", json.loads(line)
    except (OSError, ValueError, zstandard.ZstdError) as error:
        raise DatasetError(f"{path}: cannot be read as compressed JSON lines: {error}") from error


def _entries(
    where: str, row: Any, gold_key: str | None, response_key: str | None
) -> Iterator[Entry]:
    """The responses of one row: of a run's rollouts all of a prompt, else those in a column."""
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: expected an object, found {type(row).__name__}")
    prompt = row.get("prompt")
    if isinstance(prompt, dict) and "gold" in prompt and isinstance(row.get("responses"), list):
        statuses = row.get("statuses") or [None] * len(row["responses"])
        dataset = prompt.get("meta", {}).get("dataset")
        for number, (response, status) in enumerate(
            zip(row["responses"], statuses, strict=True), start=1
        ):
            cut = response.get("finish", "stop") != "stop"
            yield Entry(f"{where}.{number}", response["text"], prompt["gold"], dataset, cut, status)
        return
    gold = _gold(where, _value(where, row, gold_key, _GOLD, "gold"))
    found = _value(where, row, response_key, _RESPONSE, "response")
    texts = found if isinstance(found, list) else [found]
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise DatasetError(f"{where}: a response is a {type(text).__name__}, not text")
        yield Entry(f"{where}.{number}" if isinstance(found, list) else where, text, gold)


def _value(
    where: str, row: dict[str, Any], key: str | None, known: Sequence[str], kind: str
) -> Any:
    name = key or next((name for name in known if name in row), "")
    if name not in row:
        looked = key or ", ".join(known)
        raise DatasetError(
            f"{where}: no {kind}: no column {looked}; it has {', '.join(row)} (--{kind}-key names "
            "it)"
        )
    return row[name]


def _gold(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DatasetError(f"{where}: the gold is a {type(value).__name__}, not text")
    return str(value).rpartition("####")[2].strip()


def judge(entries: Sequence[Entry], judgings: Judgings, config: GradingConfig) -> list[Judged]:
    """Every response, judged by each verifier of its data set; those that were cut off are not
    asked about.
    """
    asked = [
        (entry, part)
        for entry in entries
        if not entry.cut
        for part in _named(entry, judgings).values()
    ]
    with Grader.of(config, judgings.verifiers) as grader:
        grades = iter(grader.ask([_question(entry, part) for entry, part in asked]))
    return [
        Judged(
            entry,
            {name: _CUT_OFF if entry.cut else next(grades) for name in _named(entry, judgings)},
        )
        for entry in entries
    ]


def _question(entry: Entry, part: Part) -> Question | None:
    answer = part.extractor(entry.response, entry.gold)
    return None if answer is None else Question(part.verifier, entry.gold, answer)


def _named(entry: Entry, judgings: Judgings) -> dict[str, Part]:
    """The verifiers of an entry's data set; one that is there twice says its region, or its
    place.
    """
    parts = judgings.of_dataset(entry.dataset).parts
    names = [part.verifier.name for part in parts]
    places = [f"{name}@{part.extractor.place}" for name, part in zip(names, parts, strict=True)]
    unique = [
        place if names.count(name) > 1 else name for name, place in zip(names, places, strict=True)
    ]
    return {
        name if unique.count(name) == 1 else f"{name}#{number}": part
        for number, (name, part) in enumerate(zip(unique, parts, strict=True), start=1)
    }


def totals(judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """Number of responses with each status, for each verifier; without statuses nobody has."""
    counts: dict[str, Counter[str]] = {}
    for one in judged:
        for name, grade in one.grades.items():
            counts.setdefault(name, Counter())[grade.status] += 1
    order = (*STATUSES, _CUT_OFF.status)
    return {
        name: {status: count[status] for status in order if count[status]}
        for name, count in counts.items()
    }


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN // 2]} ... {line[-_SHOWN // 3 :]}"


def _judgings(given: argparse.Namespace) -> tuple[Judgings, GradingConfig]:
    """The judging: by the options, else by the configuration, which a run's rollouts bring."""
    limits = {
        key: value for key in ("workers", "timeout_s") if (value := getattr(given, key)) is not None
    }
    beside = Path(given.file).resolve().parent.parent / "config.yaml"
    path = given.config or (beside if given.file.endswith(".zst") and beside.is_file() else None)
    if given.verifier is None and given.answer is None and path is not None:
        config = load(TrainConfig, path)
        own = [(dataset_name(dataset), dataset.grading) for dataset in config.data.datasets]
        return Judgings.of(config.grading, own), config.grading.model_copy(update=limits)
    options = dict(_option(text) for text in given.option)
    tree: dict[str, Any] = {
        "answer": given.answer or "last_box",
        "marker": given.marker,
        "options": options,
    }
    names = given.verifier or ["math"]
    config = validate(
        GradingConfig, {"verifier": names[0], **tree, **limits}, "command line", "grading"
    )
    judging = Judging.of(config)
    others = tuple(replace(judging.main, verifier=Verifier(name)) for name in names[1:])
    return Judgings(Judging((*judging.parts, *others))), config


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--option {text}: {value!r} is no value as YAML has them: quote it, '\"{value}\"'"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="efr grade", description="Judge a file of responses; say how and why."
    )
    # the responses, and their golds
    parser.add_argument(
        "file",
        help="JSON lines, JSON or parquet with golds and responses, or a run's rollouts (.zst)",
    )
    parser.add_argument(
        "--gold-key", help=f"column of the gold; by default the first of {', '.join(_GOLD)}"
    )
    parser.add_argument(
        "--response-key",
        help=f"column of the response; by default the first of {', '.join(_RESPONSE)}",
    )
    # the judging: by options, or as a run does it
    parser.add_argument(
        "--verifier", action="append", help="as grading.verifier; repeat it to compare"
    )
    parser.add_argument("--answer", help="as grading.answer: last_box (the default), marker, ...")
    parser.add_argument("--marker", help="as grading.marker")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the first verifier"
    )
    parser.add_argument(
        "--config",
        help="a run's configuration, to judge as it does; rollouts in a run folder have it",
    )
    # limits of the processes that judge
    parser.add_argument("--workers", type=arguments.within(int, 1), help="grading processes")
    parser.add_argument(
        "--timeout-s", type=arguments.within(float, 0.001), help="CPU seconds for one response"
    )
    # how the verdicts are shown
    parser.add_argument("--totals", action="store_true", help="no line for each response")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr grade`."""
    given = _parser().parse_args(argv)
    judgings, config = _judgings(given)
    judged = judge(read_entries(given.file, given.gold_key, given.response_key), judgings, config)
    _print(judged, given.json, given.totals)
    # a script is told by the exit code that some responses have no verdict
    if any(grade.status in UNJUDGED for one in judged for grade in one.grades.values()):
        sys.exit(EXIT_UNJUDGED)


def _print(judged: Sequence[Judged], as_json: bool, totals_alone: bool) -> None:
    disagreements = [found for one in judged if (found := one.disagreement)]
    if as_json:
        tree = {"totals": totals(judged), "disagreements": disagreements}
        responses = {} if totals_alone else {"responses": [one.tree() for one in judged]}
        print(json.dumps({**responses, **tree}, ensure_ascii=False, indent=1))
        return
    lines = [line for one in judged for line in one.lines() if not totals_alone]
    for name, counts in totals(judged).items():
        share = counts.get("correct", 0) / sum(counts.values())
        each = ", ".join(f"{status} {count}" for status, count in counts.items())
        lines.append(f"{name}: {share:.1%} of {sum(counts.values())} correct ({each})")
    if disagreements:
        lines += [f"{len(disagreements)} of {len(judged)} are judged differently:", *disagreements]
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    arguments.run(main)
