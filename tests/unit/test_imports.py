"""Rooms that may import each other, and limits on files and functions, checked on the source."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_efr"

# A unit is a room (folder) or a module of the package. What is listed it may import, and itself;
# "weights.mapping" is that module of the room alone.
BASE = {"errors", "types", "steps", "samples", "config", "durable", "log"}
WEIGHTS = {"weights"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "steps": set(),
    "types": {"errors", "steps"},
    "samples": {"types"},
    "scripts": {"errors", "types", "steps", "config"},
    "durable": {"errors"},
    "bfloat16_products": set(),
    "compiled": set(),
    "config": {"errors"},
    "log": {"errors"},
    "parent": set(),
    "parity": {"errors"},
    "arguments": BASE | {"parent"},
    "transformer_engine": {"log"},
    "algorithms": BASE,
    "kernels": BASE | {"algorithms.objective", "bfloat16_products", "compiled"},
    "grading": BASE,
    "methods": BASE | {"scripts"},
    "data": BASE,
    "addresses": {"errors"},
    "weights": BASE,
    "publication": BASE | WEIGHTS | {"addresses"},
    "policy": BASE
    | WEIGHTS
    | {
        "kernels",
        "algorithms.objective",
        "bfloat16_products",
        "compiled",
        "memory",
        "publication.bucket_plan",
        "publication.reshard",
        "transformer_engine",
    },
    "rollout": BASE
    | {"addresses", "bfloat16_products", "compiled", "scripts"}
    | {"weights.architecture", "weights.frequencies", "weights.mapping"}
    | {"publication.named_tensors", "publication.reshard", "publication.transports"},
    "evaluation": BASE
    | {"data", "grading", "observe.progress", "scripts"}
    | {"rollout.codec", "rollout.engine", "rollout.journal", "rollout.ledger", "rollout.checks"},
    "report": BASE
    | {"evaluation.comparison", "evaluation.figures", "evaluation.measures", "evaluation.records"}
    | {"evaluation.statistics", "evaluation.stored"},
    "compare": BASE
    | {
        "arguments",
        "evaluation.comparison",
        "evaluation.figures",
        "evaluation.forgetting",
        "evaluation.measures",
    }
    | {"evaluation.relative", "evaluation.stored"},
    "observe": BASE,
    "checkpoint": BASE | WEIGHTS | {"transformer_engine"},
    "memory": BASE | {"weights.architecture", "weights.mapping", "kernels"},
    "run": BASE
    | WEIGHTS
    | {
        "algorithms",
        "arguments",
        "checkpoint",
        "data",
        "evaluation",
        "grading",
        "memory",
        "methods",
        "observe",
    }
    | {"parent", "policy", "publication", "rollout", "scripts"},
    "offline": BASE
    | WEIGHTS
    | {"arguments", "checkpoint", "data", "observe", "policy", "rollout.group_json", "run"},
    # policy, if logits are compared
    "convert": BASE | WEIGHTS | {"arguments", "checkpoint", "parity", "policy"},
    "import_gguf": BASE
    | {"arguments", "data.gguf_tokenizer", "parity"}
    | {"weights.folder", "weights.gguf_file", "weights.gguf_model"},
    "grade": BASE | {"arguments", "data.datasets", "data.readers", "grading"},
    "inspect_checkpoint": BASE
    | {"arguments", "checkpoint.manifest", "checkpoint.torch_dist", "weights.lora"},
    "watch": BASE | {"arguments", "observe", "run.folder", "run.owner"},
    "torchrun": {"parent", "run.interruption"},
    "cluster": BASE
    | {"addresses", "arguments", "weights.architecture"}
    | {"rollout.servers.launcher", "rollout.servers.host"},
    "doctor": BASE
    | {
        "addresses",
        "arguments",
        "checkpoint.model_source",
        "cluster.commands",
        "cluster.placement",
        "data",
        "memory",
        "weights.architecture",
        "weights.folder",
    },
    "planning": BASE
    | WEIGHTS
    | {"algorithms", "arguments", "kernels", "memory", "policy", "scripts"}
    | {"rollout.local.decoder", "rollout.local.engine", "rollout.local.products"},
    "cli": {"arguments", "__init__"},  # it finds the programs by name, when they are asked for
}
PROGRAMS = {"train", "sft", "dpo", "evaluate", "sweep", "report.__main__"}

LINES, FUNCTION_LINES, PROGRAM_LINES = 500, 72, 210  # of 100 columns
LONG_BODY = 25  # lines of a function, without docstring, blank lines and comments, that has steps
STEP_LINES, STEP_STATEMENTS = 12, 10  # lines to a comment on average, statements in a row at most
PATCHES = {"policy.cpu"}  # the one module that may reach into megatron and torch


class Module:
    """One source file: its dotted name within the package, and its syntax tree."""

    def __init__(self, path: Path, package: Path) -> None:
        parts = path.relative_to(package).with_suffix("").parts
        self.name = ".".join(parts)
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self._package, self._base = package, [package.name, *parts[:-1]]

    @property
    def unit(self) -> str:
        """The room or module that the table speaks of."""
        return self.name if self.name in PROGRAMS else self.name.split(".")[0]

    def imports(self) -> set[str]:
        """The package's modules that are imported anywhere in the file, in functions too,
        relatively too.
        """
        return {found for dotted in self._dotted() if (found := self._module(dotted)) is not None}

    def _dotted(self) -> Iterator[list[str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = self._base[: len(self._base) - node.level + 1] if node.level else []
                module = node.module.split(".") if node.module else []
                yield from ([*start, *module, alias.name] for alias in node.names)

    def _module(self, dotted: list[str]) -> str | None:
        """The module a dotted import leads to: the longest part of it that is a file of the
        package.
        """
        if dotted[0] != self._package.name:
            return None
        for length in range(len(dotted), 0, -1):
            place = self._package.joinpath(*dotted[1:length])
            if length > 1 and place.with_suffix(".py").is_file():
                return ".".join(dotted[1:length])
            if (place / "__init__.py").is_file():
                return ".".join([*dotted[1:length], "__init__"])
        return None


@cache
def modules(package: Path) -> list[Module]:
    return [Module(path, package) for path in sorted(package.rglob("*.py"))]


def forbidden_imports(package: Path) -> list[str]:
    """Every import that the table does not allow, as `module imports module`."""
    found = []
    for module in modules(package):
        assert module.unit in MAY_IMPORT or module.unit in PROGRAMS, (
            f"{module.name}: not in MAY_IMPORT, nor CONTRIBUTING's table"
        )
        if module.unit in PROGRAMS:
            continue
        for target in sorted(module.imports()):
            room = target.split(".")[0]
            allowed = {module.unit, *MAY_IMPORT[module.unit]}
            if target in PROGRAMS or not {target, room} & allowed:
                found.append(f"{module.name} imports {target}")
    return found


def cycles(package: Path) -> list[str]:
    """Circles of imports, each as `a -> b -> a`. A package's __init__ and its modules are nodes of
    their own.
    """
    graph = {module.name: module.imports() for module in modules(package)}
    found, done = [], set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def patches(module: Module) -> list[str]:
    """Assignments to attributes of what was imported from megatron or torch: `x.y = ...`,
    setattr(x, ...).
    """
    imported = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                source = node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
                if source.split(".")[0] in ("megatron", "torch"):
                    imported.add((alias.asname or alias.name).split(".")[0])
    found = []
    for node in ast.walk(module.tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("setattr", "delattr")
        ):
            targets = [ast.Attribute(node.args[0], "...", ast.Store())]
        for target in targets:
            if isinstance(target, ast.Attribute) and _root(target) in imported:
                found.append(f"{module.name}:{node.lineno}")
    return found


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def long_functions(module: Module) -> list[str]:
    functions = [
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions]
    return [
        f"{module.name}.{name}: {lines} lines" for name, lines in lengths if lines > FUNCTION_LINES
    ]


_FOR_TOOLS = re.compile(r"# ?(noqa|type:|pyright:|fmt:|pragma)")


def silent_functions(path: Path, tree: ast.AST, source: str) -> list[str]:
    """Longer functions of a file that say too little of their steps, each with its line."""
    lines = source.splitlines(keepends=True)
    said = (
        (node, _silence(node, lines))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [f"{path}:{node.lineno} {node.name}: {silence}" for node, silence in said if silence]


def _silence(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """A sentence if a longer function lacks comments, else empty. Comments on lines that follow
    each other are one.
    """
    body = node.body[ast.get_docstring(node) is not None :]
    last = node.end_lineno or 0
    span = range(body[0].lineno, last + 1) if body else range(0)
    code = [line for line in span if not re.match(r"\s*(#|$)", lines[line - 1])]
    if len(code) <= LONG_BODY:
        return ""
    first = node.lineno
    comments = {
        first - 1 + token.start[0]
        for token in tokenize.generate_tokens(iter(lines[first - 1 : last]).__next__)
        if token.type == tokenize.COMMENT and not _FOR_TOOLS.match(token.string)
    }
    count = sum(line - 1 not in comments for line in comments)
    if count * STEP_LINES < len(code):
        return f"{len(code)} lines, {count} comments; say what each step is for, 3 to 8 statements"
    # a few comments close together leave the rest in silence
    starts = {each.lineno for part in body for each in ast.walk(part) if isinstance(each, ast.stmt)}
    run = 0
    for line in span:
        run = (0 if {line, line - 1} & comments else run) + (line in starts)
        if run > STEP_STATEMENTS:
            return f"{run} statements up to line {line} without a comment"
    return ""


def test_nobody_imports_whom_it_may_not() -> None:
    assert forbidden_imports(PACKAGE) == []


def test_imports_go_round_in_no_circle() -> None:
    assert cycles(PACKAGE) == []


def test_only_cpu_support_reaches_into_megatron_and_torch() -> None:
    assert [
        place
        for module in modules(PACKAGE)
        if module.name not in PATCHES
        for place in patches(module)
    ] == []


def test_files_and_functions_stay_short() -> None:
    for module in modules(PACKAGE):
        limit = PROGRAM_LINES if module.name in PROGRAMS else LINES
        assert len(module.source.splitlines()) <= limit, f"{module.name}: more than {limit} lines"
        assert long_functions(module) == []


def test_longer_functions_say_what_their_steps_are_for() -> None:
    root = PACKAGE.parent
    scripts = [
        path for name in ("tools", "examples") for path in sorted((root / name).rglob("*.py"))
    ]
    sources = [(path, path.read_text(encoding="utf-8")) for path in scripts]
    files = [(module.path, module.tree, module.source) for module in modules(PACKAGE)]
    files += [(path, ast.parse(source), source) for path, source in sources]
    assert [line for file in files for line in silent_functions(*file)] == []


def test_every_module_says_what_it_is_and_none_is_a_drawer() -> None:
    found = modules(PACKAGE)
    assert [module.name for module in found if not ast.get_docstring(module.tree)] == []
    assert [
        module.name
        for module in found
        if module.name.split(".")[-1] in ("utils", "util", "helpers", "misc")
    ] == []


# -- the checker, on a tree that breaks the rules
# ----------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package that keeps the rules, for tests to break."""
    package = tmp_path / "megatron_efr"
    for room in ("policy", "rollout", "weights", "grading"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").write_text('"""A room."""\n')
    (package / "__init__.py").write_text('"""The package."""\n')
    files = {
        "errors": "",
        "types": "from megatron_efr.errors import UserError",
        "train": (
            "from megatron_efr.policy.model import Model\nfrom megatron_efr.rollout import engine"
        ),
        "policy/model": (
            "import torch\nfrom megatron_efr.weights.folder import read\nfrom megatron_efr.types "
            "import A"
        ),
        "weights/folder": "from megatron_efr import errors",
        "weights/mapping": "",
        "rollout/engine": "import megatron_efr.weights.mapping",
        "grading/pool": "from .boxed import last_boxed",
        "grading/boxed": "",
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(f'"""A module."""\n{text}\n')
    return package


def test_the_checker_finds_nothing_in_a_tree_that_keeps_the_rules(tree: Path) -> None:
    assert forbidden_imports(tree) == []
    assert cycles(tree) == []


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        (
            "rollout/engine",
            "from megatron_efr.policy.model import Model",
            "rollout.engine imports policy.model",
        ),
        (
            "rollout/engine",
            "from megatron_efr.policy import model",
            "rollout.engine imports policy.model",
        ),
        (
            "rollout/engine",
            "import megatron_efr.policy.model as m",
            "rollout.engine imports policy.model",
        ),
        ("rollout/engine", "from ..policy import model", "rollout.engine imports policy.model"),
        (
            "rollout/engine",
            "def f():\n    from megatron_efr import policy",
            "rollout.engine imports policy.__init__",
        ),
        (
            "rollout/engine",
            "from megatron_efr.weights.folder import read",
            "rollout.engine imports weights.folder",
        ),
        (
            "types",
            "from megatron_efr.grading.boxed import last_boxed",
            "types imports grading.boxed",
        ),
        (
            "weights/mapping",
            "from megatron_efr.policy import Model",
            "weights.mapping imports policy.__init__",
        ),
        ("policy/model", "from megatron_efr.train import main", "policy.model imports train"),
        (
            "grading/__init__",
            "from megatron_efr.rollout import engine",
            "grading.__init__ imports rollout.engine",
        ),
    ],
)
def test_the_checker_finds_a_forbidden_import(tree: Path, file: str, line: str, found: str) -> None:
    path = tree / f"{file}.py"
    path.write_text(path.read_text() + line + "\n")
    assert forbidden_imports(tree) == [found]


def test_the_checker_finds_a_circle_even_through_a_function(tree: Path) -> None:
    (tree / "grading/boxed.py").write_text(
        '"""A module."""\ndef f():\n    from megatron_efr.grading import pool\n'
    )
    assert cycles(tree) == ["grading.boxed -> grading.pool -> grading.boxed"]


def test_the_checker_refuses_a_module_that_the_table_does_not_know(tree: Path) -> None:
    (tree / "novelty.py").write_text('"""New."""\n')
    with pytest.raises(AssertionError, match="novelty: not in MAY_IMPORT"):
        forbidden_imports(tree)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("import torch\ntorch.cuda.synchronize = None", 1),
        ("from megatron.core import parallel_state as state\nstate.x = 1", 1),
        ("from torch import Tensor\nsetattr(Tensor, 'cuda', None)", 1),
        ("import megatron.core.optimizer\ndel megatron.core.optimizer.torch", 1),
        ("import torch.nn.functional as F\nF.silu: object = None\nF.silu += 1", 2),
        (
            "import torch\nx = torch.zeros(1)\nx.y = 1\nself = object()\nself.torch = "
            "torch\nnumpy.z = 1",
            0,
        ),
    ],
)
def test_the_checker_finds_patches(tree: Path, code: str, count: int) -> None:
    (tree / "policy/model.py").write_text(code)
    assert len(patches(Module(tree / "policy/model.py", tree))) == count


def test_the_checker_finds_a_long_function(tree: Path) -> None:
    (tree / "types.py").write_text(
        ("def short():\n    pass\n\ndef long():\n") + "    pass\n" * FUNCTION_LINES
    )
    assert long_functions(Module(tree / "types.py", tree)) == [
        f"types.long: {FUNCTION_LINES + 1} lines"
    ]


@pytest.mark.parametrize(
    ("comments", "found"),
    [
        # 26 statements: every 8th has a comment, above it or behind it
        ({0: "above", 8: "above", 16: "behind", 24: "above"}, []),
        ({0: "above", 8: "above", 19: "above"}, ["11 statements up to line 24"]),
        ({0: "above", 10: "above", 20: "noqa"}, ["26 lines, 2 comments"]),
        ({}, ["26 lines, 0 comments"]),
    ],
)
def test_the_checker_finds_steps_without_a_comment(
    comments: dict[int, str], found: list[str]
) -> None:
    behind = {"behind": "  # why", "noqa": "  # noqa: E501"}
    lines = [
        ("    # why\n" if comments.get(number) == "above" else "")
        + f"    x = {number}{behind.get(comments.get(number, ''), '')}\n"
        for number in range(26)
    ]

    def said(body: str) -> list[str]:
        source = f"class C:\n  def f():\n{body}"
        return silent_functions(Path("made.py"), ast.parse(source), source)

    told = said('    """Docstring."""\n' + "".join(lines))
    assert [each in line for each, line in zip(found, told, strict=True)] == [True] * len(found)
    assert all(line.startswith("made.py:2 f: ") for line in told)
    assert said("    x = 0\n" * 25) == []  # a body that has no steps to tell
