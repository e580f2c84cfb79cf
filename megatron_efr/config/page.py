"""The page of configuration, written from the fields: `python -m megatron_efr.config >
docs/configuration.md`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_efr.config.programs import DpoConfig, EvaluateConfig, SftConfig, TrainConfig
from megatron_efr.config.section import Section
from megatron_efr.config.sweep import SweepConfig

PROGRAMS: dict[str, type[Section]] = {
    "efr train": TrainConfig,
    "efr sft": SftConfig,
    "efr dpo": DpoConfig,
    "efr evaluate": EvaluateConfig,
    "efr sweep": SweepConfig,
}
"""The programs that read a configuration, in the page's order."""

PAGES = {
    "model": "models.md",
    "parallel": "parallelism.md",
    "rollout": "engines.md",
    "grading": "grading.md",
    "method": "methods.md",
    "algorithm": "algorithms.md",
    "evaluation": "evaluation.md",
    "evaluation.script": "scripts.md",
    "checkpoint": "run-folder.md",
    "observe": "run-folder.md",
    "efr sweep": "sweeps.md",
}
"""Pages that say more of a section."""

INTRODUCTION = """# Configuration

One YAML file says what a run is: a typed section for each part, checked before anything starts. An
unknown key is an error that names the nearest known one. `section.key=value` after the file
overrides it, and so does `section.list.0.key=value` within a list. The run folder keeps the
resolved file, `config.yaml`, which runs again from there. Files to begin with are in `examples/`.

This page is written from the fields in `megatron_efr/config/`, by
`python -m megatron_efr.config > docs/configuration.md`.
*Required* keys have no default. *Left out* is null: the description says what holds then.
"""


class Place(NamedTuple):
    """A section of a program's configuration: the keys that lead to it, and its class."""

    program: str
    path: str
    section: type[BaseModel]


def page() -> str:
    """The page, as Markdown."""
    places = [place for program, config in PROGRAMS.items() for place in _places(program, config)]
    shown: dict[type[BaseModel], Place] = {}
    for place in places:
        shown.setdefault(place.section, place)
    lines = [INTRODUCTION, *_overview(places, shown)]
    for place in shown.values():
        lines += _section(place, places, shown)
    return "\n".join(lines)


def _places(program: str, config: type[Section]) -> Iterator[Place]:
    """Every section of a program, the outer ones first."""
    waiting = [Place(program, "", config)]
    while waiting:
        place = waiting.pop(0)
        yield place
        for key, field in _fields(place.section):
            if inner := section_of(field.annotation):
                waiting.append(Place(program, f"{place.path}.{key}".lstrip("."), inner))


def _fields(section: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """A section's keys as YAML has them, and their fields."""
    yield from ((field.alias or name, field) for name, field in section.model_fields.items())


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, or that it holds in a list or a mapping, or may be; None for any
    other field.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (section_of(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in found if section), None)


def _title(place: Place, shown: dict[type[BaseModel], Place]) -> str:
    """A heading: the path, with the program if another one's section of that path stands before
    it.
    """
    same = [other for other in shown.values() if other.path == place.path]
    return (
        place.path
        if place.path and same[0] == place
        else f"{place.path} of {place.program}".removeprefix(" of ")
    )


def _link(section: type[BaseModel], shown: dict[type[BaseModel], Place]) -> str:
    title = _title(shown[section], shown)
    anchor = title.replace(".", "").replace(" ", "-")
    return f"[`{title}`](#{anchor})"


def _overview(places: list[Place], shown: dict[type[BaseModel], Place]) -> Iterator[str]:
    """A table: which program has which section."""
    keys = dict.fromkeys(place.path for place in places if place.path and "." not in place.path)
    programs = dict.fromkeys(place.program for place in places if place.path)
    yield f"| section | {' | '.join(_link(PROGRAMS[program], shown) for program in programs)} |"
    yield "|---|" + "---|" * len(programs)
    for key in keys:
        found = {place.program: place.section for place in places if place.path == key}
        cells = [_link(found[program], shown) if program in found else "" for program in programs]
        yield f"| `{key}` | {' | '.join(cells)} |"
    yield ""


def _section(
    place: Place, places: list[Place], shown: dict[type[BaseModel], Place]
) -> Iterator[str]:
    """One section: its heading, what it is, and its keys."""
    # heading, and the other places that take the same keys
    others = [other for other in places if other.section is place.section and other != place]
    also = dict.fromkeys(f"`{other.path}`" for other in others if other.path != place.path)
    yield f"## {_title(place, shown)}"
    yield ""
    yield inspect.cleandoc(place.section.__doc__ or "")
    yield ""
    if also:
        yield f"The same keys: {', '.join(also)}."
        yield ""
    # keys that are those of a section shown before are named, not repeated
    schema = place.section.model_json_schema(by_alias=True)
    elsewhere = _elsewhere(place.section, shown)
    repeated = [
        key
        for key, field in _fields(place.section)
        if elsewhere and _is_same(elsewhere, key, field)
    ]
    if elsewhere and repeated:
        yield f"As in {_link(elsewhere, shown)}: {', '.join(f'`{key}`' for key in repeated)}."
        yield ""
    # the others, a row each
    rest = [(key, field) for key, field in _fields(place.section) if key not in repeated]
    if rest:
        yield "| key | values | default | |"
        yield "|---|---|---|---|"
        for key, field in rest:
            yield _row(key, field, schema["properties"][key], shown)
        yield ""
    # some sections have a page of their own
    if more := PAGES.get(_title(place, shown)):
        yield f"More: [{more.removesuffix('.md').replace('-', ' ')}]({more})."
        yield ""


def _elsewhere(
    section: type[BaseModel], shown: dict[type[BaseModel], Place]
) -> type[BaseModel] | None:
    """A section that stands earlier on the page and shares a base with this one, and so some
    keys.
    """
    bases = {
        base
        for base in section.__mro__
        if base.__module__.startswith(__package__ or "") and getattr(base, "model_fields", None)
    }
    for other in shown:
        if other is section:
            return None
        if bases & set(other.__mro__):
            return other
    return None


def _is_same(other: type[BaseModel], key: str, field: FieldInfo) -> bool:
    """True if another section has the very key: the type, its limits, the default and the
    description.
    """
    return repr(dict(_fields(other)).get(key)) == repr(field)


def _row(
    key: str, field: FieldInfo, schema: dict[str, Any], shown: dict[type[BaseModel], Place]
) -> str:
    inner = section_of(field.annotation)
    described = (field.description or "").replace("|", "\\|")
    if inner is None:
        return f"| `{key}` | {values(schema)} | {default_of(field)} | {described} |"
    kind = {"array": "list of sections", "object": "mapping to sections"}.get(
        schema.get("type", ""), "section"
    )
    default = "" if kind == "section" and field.default_factory else default_of(field)
    purpose = described or first_sentence(inner.__doc__ or "").rstrip(".")
    return f"| `{key}` | {kind} {_link(inner, shown)} | {default} | {purpose} |"


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
    return re.split(r"(?<=\.)\s+(?=[A-Z`])", paragraph, maxsplit=1)[0]


def values(schema: dict[str, Any]) -> str:
    """The values that a field takes, from its JSON schema, as a reader of YAML names them."""
    if "enum" in schema or "const" in schema:
        return " ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " or ".join(values(each) for each in schema["anyOf"] if each.get("type") != "null")
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return " ".join([kind, *_limits(schema)])
    if kind == "array":
        return f"list of {values(schema.get('items', {}))}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {values(inner)}" if isinstance(inner, dict) else "mapping"
    return {"boolean": "`true` `false`", "string": "text"}.get(str(kind), "any value")


def _limits(schema: dict[str, Any]) -> Iterator[str]:
    """`from`, `above`, `to` and `below`: the range of a number."""
    low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if schema["type"] == "integer" and low is not None:
        yield f"from {low + 1}"
    elif low is not None:
        yield f"above {low:g}"
    if "minimum" in schema:
        yield f"from {schema['minimum']:g}"
    if "maximum" in schema:
        yield "to 2^63 - 1" if schema["maximum"] == 2**63 - 1 else f"to {schema['maximum']:g}"
    if high is not None:
        yield f"below {high:g}"


def default_of(field: FieldInfo) -> str:
    """A field's default as YAML writes it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "left out" if value is None else f"`{json.dumps(value)}`"


def undescribed() -> list[str]:
    """The keys and sections that say nothing of themselves, each with what it lacks."""
    found = []
    for program, config in PROGRAMS.items():
        for place in _places(program, config):
            if "__doc__" not in vars(place.section) or not place.section.__doc__:
                found.append(f"{place.section.__name__}: give the class a docstring")
            for key, field in _fields(place.section):
                if not field.description and section_of(field.annotation) is None:
                    found.append(
                        f"{place.section.__name__}.{key}: give the field a description, "
                        "Field(description=...)"
                    )
    return list(dict.fromkeys(found))
