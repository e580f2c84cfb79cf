"""A sweep's file: one training configuration, what varies of it, and the members that come of
that.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, PositiveInt

from megatron_efr.config import ConfigError, Section, TrainConfig
from megatron_efr.config.file import apply, load, put, read_tree, validate
from megatron_efr.config.leaves import leaves

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Key = Annotated[str, Field(pattern=r"^[^.\s]+(\.[^.\s]+)*$")]
Values = Mapping[str, Any]

# names within a sweep's folder
_TAKEN = re.compile(r"base(-\d+)?|configs|eval(-.*)?|finished|logs|report")
_OWN = ("name", "runs")  # keys that the sweep sets for its members
_MOST_CHARACTERS = 200  # of a member's name, which is a file's with something added
_ABSENT = object()


class SweepConfig(Section):
    """`efr sweep FILE`: every member is `base` with `set`, one of `members`, and one value of each
    key of `vary`.
    """

    base: str = Field(description="the training configuration; a path from this file's folder")
    name: str = Field(description="the family's folder is runs/name")
    runs: str | None = Field(
        default=None, description="the folder of all runs; the base's when left out"
    )
    set: dict[Key, Any] = Field(
        default_factory=dict, description="keys that differ from the base for all members"
    )
    members: dict[Name, dict[Key, Any]] = Field(
        default_factory=dict,
        description="by name: keys that a member sets; a section given as a value replaces it",
    )
    vary: dict[Key, list[Any] | dict[Name, Any]] = Field(
        default_factory=dict,
        description="by key: its values, or values by name; members are the product",
    )
    jobs: PositiveInt = Field(default=1, description="programs at once")
    ranks: PositiveInt = Field(
        default=1, description="processes of each run (torchrun --nproc-per-node)"
    )
    note: str = Field(
        default="", description="what the report's reader must know about these figures"
    )
    against: Name | None = Field(
        default=None,
        description=(
            "model that all others are compared with; when left out the first one, or the base of "
            "one run each"
        ),
    )
    slurm: list[str] = Field(
        default_factory=list, description="options of sbatch for `--slurm`, such as --gpus=8"
    )


class Member(NamedTuple):
    """One run of a sweep; `changed` has, by key, what it sets of the base's configuration.

    Members that differ in their seed alone have one `model`, and its `label` for people.
    """

    name: str
    changed: Values
    config: TrainConfig
    model: str
    label: str


class _Part(NamedTuple):
    """One value of `vary`, or one of `members`: a part of a member's name, and keys."""

    name: str
    label: str
    changed: Values


class Sweep(NamedTuple):
    """A sweep as it runs: its file, the configuration that all members change, and the members."""

    file: SweepConfig
    config: TrainConfig
    members: list[Member]


def varied(members: Sequence[Member]) -> dict[str, dict[str, Any]]:
    """By member: the value of every key that any member sets, as far as its configuration has that
    key.
    """
    changed = [pair for member in members for pair in member.changed.items()]
    names = dict.fromkeys(name for key, value in changed for name, _ in leaves(key, value))
    found: dict[str, dict[str, Any]] = {}
    for member in members:
        tree = member.config.model_dump(mode="json", by_alias=True)
        values = dict(leaves("", tree))
        values |= {name: _within(tree, name) for name in names if name not in values}
        found[member.name] = {name: values[name] for name in names if values[name] is not _ABSENT}
    return found


def _within(tree: Any, key: str) -> Any:
    """Value of a key into lists, such as `data.datasets.0.limit`; _ABSENT if there is none."""
    for name in key.split("."):
        if isinstance(tree, list) and name.isdecimal() and int(name) < len(tree):
            tree = tree[int(name)]
        elif isinstance(tree, Mapping) and name in tree:
            tree = tree[name]
        else:
            return _ABSENT
    return _ABSENT if isinstance(tree, Mapping) else tree


def is_sweep(path: str | Path) -> bool:
    """True if the file is a sweep's and not a training configuration: it names a `base`."""
    return "base" in read_tree(path)


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep's file; `overrides` change the base's configuration, and through it every
    member.

    ConfigError names what is wrong with the file, with the base or with members, all of them at
    once.
    """
    file = validate(SweepConfig, read_tree(path), str(path))
    base = Path(path).parent / file.base
    tree = read_tree(base) | {"name": file.name}
    if file.runs is not None:
        tree["runs"] = file.runs
    for key, value in file.set.items():
        put(tree, key, copy.deepcopy(value), f"set.{key}")
    varied = [key for keys in (*file.members.values(), file.vary) for key in keys]
    for override in overrides:
        key = override.partition("=")[0]
        if hidden := next((name for name in varied if _overlap(name, key)), None):
            raise ConfigError(
                f"{override!r}: members of {path} set {hidden} themselves; --only chooses among "
                "them"
            )
        apply(tree, override)
    made = Sweep(file, validate(TrainConfig, tree, str(base)), _members(file, tree, str(path)))
    models = dict.fromkeys(member.model for member in made.members)
    if file.against is not None and file.against not in models:
        raise ConfigError(
            f"{path}: against: no model is named {file.against}; there are {', '.join(models)}"
        )
    return made


def load_alphas(path: str | Path, overrides: Iterable[str], written: str) -> Sweep:
    """Models of a training configuration that differ in method.alpha alone, `written` as in
    `0,0.1,0.4`.
    """
    config = load(TrainConfig, path, overrides)
    try:
        values = [float(text) for text in written.split(",")]
    except ValueError as error:
        raise ConfigError(f"--alphas {written!r}: {error}") from error
    if len({f"{alpha:g}" for alpha in values}) < len(values):
        raise ConfigError(
            f"{path}: --alphas: {', '.join(f'{a:g}' for a in values)}: each value once; it names "
            "the run"
        )
    file = SweepConfig(base=str(path), name=config.name)
    return Sweep(file, config, [_alpha(config, alpha) for alpha in sorted(values)])


def _alpha(config: TrainConfig, alpha: float) -> Member:
    made = config.model_copy(deep=True)
    made.method = made.method.model_copy(update={"alpha": alpha})
    made.name = f"{config.name}/alpha-{alpha:g}"
    name = f"alpha-{alpha:g}"
    return Member(name, {"method.alpha": alpha}, made, name, f"alpha {alpha:g}")


def _members(file: SweepConfig, tree: Mapping[str, Any], source: str) -> list[Member]:
    """The members, checked as far as a configuration shows; one ConfigError for all that is
    wrong.
    """
    made: list[Member] = []
    problems: dict[str, list[str]] = {}
    for parts in _products(file, source):
        name = _name(parts)
        changed = _together(parts, name, source)
        own = copy.deepcopy(dict(tree))
        try:
            for key, value in changed.items():
                put(own, key, copy.deepcopy(value), f"member {name}: {key}")
            own["name"] = f"{own['name']}/{name}"
            config = validate(TrainConfig, own)
        except ConfigError as error:
            problems.setdefault(str(error), []).append(name)
            continue
        but_seed = _but_seed(parts)
        label = ", ".join(part.label for part in but_seed) or "trained"
        made.append(Member(name, changed, config, _name(but_seed) or "trained", label))
    if problems:
        raise ConfigError(
            "\n".join(f"{source}: {of_members(names)}: {text}" for text, names in problems.items())
        )
    if not made:
        raise ConfigError(f"{source}: it has no members: a list in vary is empty")
    return made


def of_members(names: Sequence[str]) -> str:
    """`member a`, `members a, b`, `members a, b, c and 9 others`."""
    shown = ", ".join(names[:3])
    others = f" and {len(names) - 3} others" if len(names) > 3 else ""
    return f"member{'s' * (len(names) > 1)} {shown}{others}"


def _products(file: SweepConfig, source: str) -> Iterator[Sequence[_Part]]:
    """Every member as its parts: the product of `members` and of each key of `vary`, in that
    order.
    """
    if not (file.members or file.vary):
        raise ConfigError(
            f"{source}: nothing varies; give members, or keys with their values in vary"
        )
    # an axis each: the named members, and the values of every key of vary
    axes: list[list[_Part]] = []
    if file.members:
        axes.append([_Part(name, name, changed) for name, changed in file.members.items()])
    axes += [list(_values(key, values, source)) for key, values in file.vary.items()]
    # a name becomes a run's folder: it must be the member's own, free and short enough
    seen: set[str] = set()
    for parts in itertools.product(*axes):
        name = _name(parts)
        if name in seen:
            raise ConfigError(
                f"{source}: two members are named {name}; name the values: vary.KEY: {{NAME: "
                f"value}}"
            )
        # the model has a folder too: the member's name without its seed
        for taken in (name, _name(_but_seed(parts))):
            if _TAKEN.fullmatch(taken):
                raise ConfigError(
                    f"{source}: no member may be named {taken}: a sweep has something of that "
                    "name already"
                )
        if len(name) > _MOST_CHARACTERS:
            raise ConfigError(
                f"{source}: member {name[:60]}...: its name has {len(name)} characters, and a "
                f"folder's at most {_MOST_CHARACTERS}; name the values: vary.KEY: {{NAME: value}}"
            )
        seen.add(name)
        yield parts


def _name(parts: Sequence[_Part]) -> str:
    return "_".join(part.name for part in parts)


def _but_seed(parts: Sequence[_Part]) -> list[_Part]:
    """The parts that make another model: all but those that set the seed and nothing else."""
    return [part for part in parts if part.changed.keys() != {"seed"}]


def _values(key: str, values: Sequence[Any] | Mapping[str, Any], source: str) -> Iterator[_Part]:
    """The values of a key, each with the name that it gives: alpha-0.1 for method.alpha, grpo for
    algorithm.name.
    """
    if isinstance(values, Mapping):
        yield from (_Part(name, name, {key: value}) for name, value in values.items())
        return
    stem = key.rpartition(".")[2]
    for value in values:
        if isinstance(value, list | dict):
            raise ConfigError(
                f"{source}: vary.{key}: a list or a section has no name of its own; {{NAME: value}}"
            )
        text = _written(value)
        named = stem == "name"
        yield _Part(
            text if named else f"{stem}-{text}", text if named else f"{stem} {text}", {key: value}
        )


def _written(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, str):
        return re.sub(r"[^A-Za-z0-9.-]+", "-", value).strip("-.") or "empty"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _together(parts: Sequence[_Part], name: str, source: str) -> Values:
    """The keys of all parts; ConfigError if one would set again what another has set, or belongs to
    the sweep.
    """
    changed: dict[str, Any] = {}
    for key, value in ((key, value) for part in parts for key, value in part.changed.items()):
        if key in _OWN:
            raise ConfigError(
                f"{source}: member {name}: {key}: the sweep sets it for each member; leave it out"
            )
        if lost := next((other for other in changed if f"{other}.".startswith(f"{key}.")), None):
            raise ConfigError(
                f"{source}: member {name}: {key} would replace {lost}, set before it; put {key} "
                "first"
            )
        changed[key] = value
    return changed


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
