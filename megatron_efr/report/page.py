"""The report: one self-contained HTML page (no request leaves it) and its pictures as PNG and
SVG.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import to_hex, to_rgb

from megatron_efr.durable import write_atomic
from megatron_efr.evaluation.records import Record
from megatron_efr.report import sentences
from megatron_efr.report.results import Metrics, Results
from megatron_efr.report.sections import SECTIONS


def write_report(
    summary: Record,
    evaluations: Mapping[str, Record],
    metrics: Metrics,
    out: str | Path,
    *,
    title: str = "Efficient reasoning",
    note: str = "",
    configs: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write `out`/index.html, and every plot of it as NAME.png and NAME.svg; returns the page's
    path.

    `summary` is summary.json's tree (of one seed or of several; `{"models": [], "seconds": {}}` for
    a run that was not evaluated), `evaluations` run name -> evaluation record, `metrics` run name
    -> the lines of metrics.jsonl. `note` is said at the top: what the reader must know about these
    figures. `configs` maps a run to its configuration's text, `versions` a package to its version.
    A section without data says so; pictures without data are not written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # sections build their blocks from the results; the template lays them out
    results = Results(summary, evaluations, metrics, out, configs or {}, versions or {})
    hues = results.hues
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            note=note,
            headline=sentences.headline(results.models, metrics),
            sections=[
                (section.anchor, section.title, section.build(results)) for section in SECTIONS
            ],
            colours=[(f"--m{i}", hue, _lighter(hue)) for i, hue in enumerate(hues.values())],
            swatches={name: f"var(--m{i})" for i, name in enumerate(hues)},
        )
    )
    path = out / "index.html"
    write_atomic(path, html)
    return path


def _environment() -> Environment:
    loader = PackageLoader("megatron_efr.report", ".")
    return Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _lighter(hue: str) -> str:
    """The same hue for a dark page: two fifths of the way to white."""
    red, green, blue = (channel + 0.4 * (1 - channel) for channel in to_rgb(hue))
    return to_hex((red, green, blue))
