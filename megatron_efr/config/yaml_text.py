"""Reads YAML as people mean it: what YAML 1.1 would quietly read as something else is an error that
says where.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatron_efr.config.section import ConfigError

LARGEST_INT = 2**63 - 1
MOST_VALUES = 100_000  # that aliases may spread a document to
_TAG = "tag:yaml.org,2002:"
_KNOWN = {_TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_HINTS = {
    "'\\t'": "; indent with spaces, a tab may not begin a line or a value",
    "mapping values are not allowed": "; put quotes around a text that holds a colon and a space",
    "another document": "; one file is one configuration: take the line of --- out",
    "cannot start any token": "; put quotes around a text that begins with this character",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string; people who set a learning rate mean a number."""


_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(
        r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$|^[-+]?(?:\d+\.\d*|\.\d+)$|^[-+]?\.inf$|^\.nan$",
        re.IGNORECASE,
    ),
    list("-+0123456789."),
)


def decoded(data: bytes, source: str) -> str:
    """A file's bytes as text; ConfigError, with the line, if they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}:{line}: not UTF-8: the byte 0x{data[error.start]:02x}; save the file as "
            "UTF-8"
        ) from error


def parse(text: str, source: str, prefix: str = "", what: str = "not valid YAML") -> Any:
    """The one document of `text`: maps, lists, texts, numbers, booleans and null.

    ConfigError lists everything that is wrong, each with its line and its key below `prefix`.
    `source` is a file's name, which lines are counted in; or an override, quoted, which has none.
    """

    def at(line: int) -> str:
        return source if source.startswith(("'", '"')) else f"{source}:{line + 1}"

    try:
        loader = _Loader(text)
        # the tree first: values that YAML 1.1 would read as something else are refused
        node = loader.get_single_node()
        if node is None:
            return None
        check = _Check(loader, at)
        check.visit(node, prefix)
        if check.problems:
            raise ConfigError("\n".join(check.problems))
        return loader.construct_document(node)
    # each kind of error with its place, in our words
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        character: Any = error.character  # its number, whatever the stub says
        raise ConfigError(
            f"{at(line)}: {what}: the character U+{character:04X} is not allowed here"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = str(error.problem or error.context)
        hint = next((hint for part, hint in _HINTS.items() if part in said), "")
        raise ConfigError(f"{at(mark.line if mark else 0)}: {what}: {said}{hint}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: {what}: nested too deeply") from error


class _Check:
    """Walks a document's nodes, each once, and collects what is wrong with them."""

    def __init__(self, loader: _Loader, at: Callable[[int], str]) -> None:
        self._loader, self._at = loader, at
        self._sizes: dict[int, int] = {}  # of the nodes that were walked; 0 while they are
        self.problems: list[str] = []

    def visit(self, node: Node, path: str) -> int:
        """Check `node`, whose key is `path`, and what it holds; returns how many values it spreads
        to.
        """
        size = self._sizes.get(id(node))
        if size == 0:
            self._refuse(node, path, "this anchor holds itself")
        if size is not None:
            return size
        self._sizes[id(node)] = 0
        size = 1
        if node.tag not in _KNOWN:
            self._refuse(node, path, _about_tag(node))
        elif isinstance(node, MappingNode):
            size += self._visit_mapping(node, path)
        elif isinstance(node, SequenceNode):
            size += sum(self.visit(item, _join(path, str(i))) for i, item in enumerate(node.value))
        elif isinstance(node, ScalarNode) and (problem := self._about_scalar(node)):
            self._refuse(node, path, problem)
        if size > MOST_VALUES and not self.problems:
            self._refuse(node, path, f"its aliases spread to more than {MOST_VALUES:,} values")
        self._sizes[id(node)] = size
        return size

    def _visit_mapping(self, node: MappingNode, path: str) -> int:
        lines: dict[str, int] = {}
        size = 0
        for key, value in node.value:
            problem = None if key.tag == _TAG + "merge" else self._about_key(key)
            if problem is not None:
                self._refuse(key, path, f"{_written(key)}: {problem}")
                continue
            where = path if key.tag == _TAG + "merge" else _join(path, key.value)
            if key.value in lines:
                self._refuse(key, where, f"set twice, first in line {lines[key.value]}; leave one")
            lines.setdefault(key.value, key.start_mark.line + 1)
            size += self.visit(value, where)
        return size

    def _about_key(self, key: Node) -> str | None:
        if not isinstance(key, ScalarNode) or key.tag != _TAG + "str":
            return "a key is text; put quotes around it"
        return self._about_scalar(key)

    def _about_scalar(self, node: ScalarNode) -> str | None:
        """Name what is wrong with a text, number, boolean or null."""
        written = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            if written == "None" and node.style is None:
                return "None is a text in YAML; write null for nothing, or put quotes around it"
            return about_text(written)
        if kind in ("int", "float"):
            return self._about_number(node, written, kind)
        return None

    def _about_number(self, node: ScalarNode, written: str, kind: str) -> str | None:
        try:
            value: float = self._loader.construct_object(node)
        except (ValueError, OverflowError):
            return f"{_short(written)} is no number that can be read"
        if ":" in written:
            return (
                f"{written} is {value:g} to YAML, which counts in sixties; write that, or put "
                "quotes around a text"
            )
        if kind == "int":
            if _OCTAL.fullmatch(written) and value != int(written.replace("_", "")):
                decimal = int(written.replace("_", ""))
                return (
                    f"{written} is {value} to YAML, which reads a leading 0 as octal; write "
                    f"{decimal} or {value}"
                )
            if abs(value) > LARGEST_INT:
                return (
                    f"{_short(written)} is beyond 2^63 - 1, the largest integer there is room for"
                )
        return None

    def _refuse(self, node: Node, path: str, problem: str) -> None:
        where = self._at(node.start_mark.line)
        self.problems.append(f"{where}: {path}: {problem}" if path else f"{where}: {problem}")


def about_text(text: str) -> str | None:
    """Name what keeps `text` out of files and paths; None if nothing does."""
    if "\0" in text:
        return "a text with the character U+0000, which nothing can be named"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"a text with half a character: the lone surrogate U+{ord(text[error.start]):04X}"
    return None


def _about_tag(node: Node) -> str:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, ScalarNode) and kind in ("timestamp", "value"):
        meaning = "a date" if kind == "timestamp" else "a sign of its own"
        return f"{node.value} is {meaning} to YAML; put quotes around it"
    return f"the tag {node.tag.replace(_TAG, '!!')} has no meaning here; leave it out"


def _written(key: Node) -> str:
    return str(key.value) if isinstance(key, ScalarNode) else "a key that is a list or a section"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text)} digits)"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
