"""Holds `rollout.server` to the arguments that the engine's interpreter has, without importing
SGLang.
"""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Optional, Union

from megatron_efr.config import EnginesConfig
from megatron_efr.config.passed_on import check_passed_on

LIMIT_S = 60
_FIND = "import importlib.util as u; print(u.find_spec('sglang').submodule_search_locations[0])"
# the names that SGLang's annotations are written in; one in any other is left to SGLang
_NAMES: dict[str, Any] = {
    **{kind.__name__: kind for kind in (bool, dict, float, int, list, set, str)},
    "Any": Any,
    "Dict": dict,
    "List": list,
    "Literal": Literal,
    "Optional": Optional,
    "Union": Union,
}


def check_server_arguments(engines: EnginesConfig) -> None:
    """ConfigError for a key of `rollout.server` that SGLang does not know, or of another type than
    it takes.

    If there is no such interpreter, or no SGLang in it, whatever starts the servers will say so.
    """
    if not engines.server or not os.access(engines.python, os.X_OK):
        return
    done = subprocess.run(
        [engines.python, "-c", _FIND], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode == 0:
        check_against(Path(done.stdout.strip()), engines.server)


def check_against(package: Path, given: dict[str, Any]) -> None:
    """ConfigError if the sources of SGLang in folder `package` have no such argument, or another
    type for it.

    Its dataclass is put together of fields written as `name: A[type, help]`; a flag that is no
    field (an old name of one) is known by its text alone, and of any type.
    """
    sources = [*(package / "srt" / "arg_groups").rglob("*.py"), package / "srt" / "server_args.py"]
    texts = [path.read_text(encoding="utf-8") for path in sources if path.is_file()]
    fields = {name: annotation for text in texts for name, annotation in _fields(text)}
    if not fields:
        return  # another layout of SGLang's sources
    flags = {key for key in given if any(f'"--{key.replace("_", "-")}"' in text for text in texts)}
    known = fields | dict.fromkeys(flags - fields.keys(), Any)
    check_passed_on("rollout.server", given, known, "SGLang's server")


def _fields(text: str) -> Iterator[tuple[str, Any]]:
    for kind in ast.parse(text).body:
        if not isinstance(kind, ast.ClassDef):
            continue
        for line in kind.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                yield line.target.id, _annotation(line.annotation)


def _annotation(node: ast.expr) -> Any:
    """The type that an annotation writes; Any if it is in other names than the plain ones."""
    if (
        isinstance(node, ast.Subscript)
        and ast.unparse(node.value) == "A"
        and isinstance(node.slice, ast.Tuple)
    ):
        node = node.slice.elts[0]
    try:
        return eval(ast.unparse(node), {"__builtins__": {}}, _NAMES)
    except (NameError, TypeError, AttributeError):
        return Any
