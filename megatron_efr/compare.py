"""`efr compare`: two evaluations of the same problems beside each other, with paired intervals and
tests.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_efr import arguments
from megatron_efr.errors import UserError
from megatron_efr.evaluation.comparison import Comparison, Paired, compare
from megatron_efr.evaluation.figures import Figure, with_interval
from megatron_efr.evaluation.measures import named
from megatron_efr.evaluation.relative import RELATIVE
from megatron_efr.evaluation.stored import read_evaluation

_COLUMNS = ("measure", "one", "other", "difference", "p", "test")


def record_path(given: Path) -> Path:
    """The record that a person names: its file, or the folder of a run that has one; UserError
    otherwise.
    """
    if not given.is_dir():
        return given
    found = sorted((given / "eval").glob("*.json"))
    if len(found) != 1:
        said = (
            f"several evaluations: {', '.join(path.name for path in found)}"
            if found
            else "no evaluation"
        )
        raise UserError(f"{given}: has {said}; name the file of one, RUN/eval/NAME.json")
    return found[0]


def priced(text: str) -> tuple[float, float]:
    """Prices of a token read and of one drawn, from those of a million: `0.5,2`; UserError for
    anything else.
    """
    try:
        read, drawn = (float(price) / 1e6 for price in text.split(","))
        if not all(0 <= price < math.inf for price in (read, drawn)):
            raise ValueError("a price is negative, or no number")
    except ValueError as error:
        raise UserError(
            f"--prices {text!r}: {error}; give two, of a million prompt tokens and of a million "
            "generated ones: 0.5,2"
        ) from error
    return read, drawn


def table(comparison: Comparison) -> str:
    """The comparison for a terminal: a line for each measure, data set and difficulty."""
    rows = [_COLUMNS, *map(_cells, comparison.figures)]
    for kind, parts in (("", comparison.datasets), ("difficulty ", comparison.difficulties)):
        for part, figures in parts.items():
            rows += [(f"{row.name}, {kind}{part}", *_cells(row)[1:]) for row in figures]
    for name, figure in comparison.relative.items():
        rows.append((name, "", write(figure, RELATIVE[name].unit), "", "", ""))
    lines = [*_aligned(rows), "", *_aligned(_turned(comparison))]
    said = (
        f"{comparison.problems:,} problems. In brackets: 95% intervals over problems, of the "
        "difference with both models' answers\nto a problem together. p: the chance of such a "
        "difference if the models were the same. Forgotten: problems\nthat the one gets right, "
        "and the other wrong; learnt: the reverse. Right: in more than half of the responses."
    )
    unlike = "".join(f"\n  {line}" for line in comparison.unlike)
    return "\n".join([*lines, "", said]) + (
        f"\nNot asked or judged alike:{unlike}" if unlike else ""
    )


def _turned(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for each data set: what the other model forgot of it, and learnt."""
    rows = [("data set", "problems", "forgotten", "learnt", "net", "p")]
    for name, found in comparison.turned.items():
        shares = (
            write(found.forgotten, "%"),
            write(found.learnt, "%"),
            write(found.net, "%", sign="+"),
        )
        rows.append((name, f"{found.problems:,}", *shares, f"{found.p:.4f}"))
    return rows


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cells(row: Paired) -> tuple[str, ...]:
    p = "" if row.p is None else f"{row.p:.4f}"
    figures = (
        write(row.one, row.unit),
        write(row.other, row.unit),
        write(row.difference, row.unit, sign="+"),
    )
    return (row.name, *figures, p, row.test)


def write(figure: Figure, unit: str, sign: str = "") -> str:
    """`72.3% [69.5, 74.9]`; with a `sign`, for a difference, `+4.0 [1.2, 6.8]`; a dash for what is
    not finite.
    """
    if figure.value is None:
        return "–"
    scale, spec = (
        (100, ".1f") if unit == "%" else (1, ".3g" if unit in ("r", "x", "", "money") else ".1f")
    )
    text = f"{scale * figure.value:{sign}{spec}}{'%' if unit == '%' and not sign else ''}"
    return with_interval(text, figure.low, figure.high, lambda end: f"{scale * end:{spec}}")


def as_json(comparison: Comparison) -> str:
    """The comparison as JSON: its fields by name."""
    return json.dumps(_plain(comparison), indent=1, allow_nan=False, ensure_ascii=False)


def _plain(tree: Any) -> Any:
    """The same of dicts and lists, a named tuple's fields by their names."""
    if hasattr(tree, "_asdict"):
        tree = tree._asdict()
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list) else tree


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr compare`."""
    parser = argparse.ArgumentParser(
        prog="efr compare", description="Two evaluations of the same problems."
    )
    # two records, of which the first is what the other is measured by
    parser.add_argument(
        "one", type=Path, help="RUN/eval/NAME.json, or a run with one evaluation; the base"
    )
    parser.add_argument("other", type=Path, help="likewise, compared with the base")
    # which figures, and what they need to be told
    parser.add_argument(
        "--measures",
        metavar="NAME,...",
        help="these alone, such as accuracy,pass@4,accuracy_within@512",
    )
    parser.add_argument(
        "--prices",
        metavar="IN,OUT",
        help="prices of a million prompt tokens and a million generated ones, for cost_of_pass",
    )
    # what is refused otherwise, the draws, and how it is shown
    parser.add_argument(
        "--unlike",
        action="store_true",
        help="compare what was not asked or judged alike, and say so",
    )
    parser.add_argument(
        "--seed", type=arguments.within(int, 0), default=0, help="seed of the bootstrap"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    given = parser.parse_args(argv)
    one, other = (read_evaluation(record_path(path)) for path in (given.one, given.other))
    measures = [named(name.strip()) for name in given.measures.split(",")] if given.measures else []
    prices = priced(given.prices) if given.prices else None
    found = compare(one, other, measures, prices=prices, seed=given.seed, unlike=given.unlike)
    print(as_json(found) if given.json else table(found), flush=True)


if __name__ == "__main__":
    arguments.run(main)
