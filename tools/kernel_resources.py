"""Registers, spills and shared memory of every shipped Triton kernel, compiled for a GPU that need
not be here.

    python tools/kernel_resources.py
        # a table; exit status 1 if a kernel spills or does not fit
    python tools/kernel_resources.py --arch 100 --json resources.json

Each configuration is compiled as the launcher would: pointers to logits aligned; rows of logits and
the vocabulary divisible by 16 (even), neither (odd), or a padded row over a vocabulary that is not
(mixed: the common case) and read from the very machine code that Triton would load. Figures differ
between Triton versions: what counts is the version that runs. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_efr.kernels import triton_credits, triton_rows

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # per multiprocessor, compute capability 8.0 to 10.0
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per thread block
DIVISIBLE = {  # by 16, of the row kernels' integers
    "even": {"stride", "out_stride", "columns", "width"},
    "mixed": {"stride", "out_stride", "width"},
    "odd": set[str](),
}
NARROW = 1500  # columns: a shard of a small vocabulary, below one block

# types of the row kernels' arguments, by name; every other pointer is to a per-row fp32 vector
ROW_INTEGERS = ("stride", "out_stride", "rows", "columns", "width")
ROW_FLOATS = ("scale", "low", "high", "dual", "beta", "bonus", "factor")


@dataclass(frozen=True, slots=True)
class Configuration:
    """One kernel as it is launched: argument types by name, compile-time constants, what is
    divisible by 16.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]
    warps: int


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of one compiled kernel: per thread, per thread block, and how many warps a
    multiprocessor holds.
    """

    name: str
    warps: int
    registers: int
    stack_bytes: int
    local_loads: int
    local_stores: int
    shared_bytes: int
    resident_warps: int

    @property
    def spills(self) -> bool:
        return self.stack_bytes + self.local_loads + self.local_stores > 0


def configurations() -> Iterator[Configuration]:
    """Everything that the launchers can launch, up to numbers that change no code."""
    for parity in DIVISIBLE:
        yield from _row_configurations(*triton_rows.shape_for(triton_rows.BLOCK * 8), parity)
    yield from _row_configurations(*triton_rows.shape_for(NARROW), "odd")
    types = {"ends": "*i64", "sums": "*fp64", "squares": "*fp64", "counts": "*fp64", "beta": "fp32"}
    types |= dict.fromkeys(("advantages", "weights", "olds", "references", "per_token"), "*fp32")
    for kl in (False, True):
        constants = {"KL": kl, "BLOCK": triton_credits.BLOCK}
        aligned = frozenset({"ends", "sums"})
        name = "credits" + " kl" * kl
        yield Configuration(
            name, triton_credits.credit_kernel, types, constants, aligned, triton_credits.WARPS
        )


def _row_configurations(block: int, warps: int, parity: str) -> Iterator[Configuration]:
    """The head's logits are fp32; gradients are of the weight's dtype."""
    tail = f" block={block} {parity}"
    plain = [{"ENTROPY": entropy, "BLOCK": block} for entropy in (False, True)]
    for constants in plain:
        name = f"statistics{' entropy' * constants['ENTROPY']}{tail}"
        yield _row(name, triton_rows.statistics_kernel, None, constants, parity, warps)
    for dtype in ("fp32", "bf16", *(["fp16"] if parity == "mixed" else [])):
        for constants in plain:
            name = f"gradient {dtype}{' entropy' * constants['ENTROPY']}{tail}"
            yield _row(name, triton_rows.gradient_kernel, dtype, constants, parity, warps)
        for label, terms in OBJECTIVES.items():
            name = f"policy {dtype} {label}{tail}"
            yield _row(
                name, triton_rows.policy_kernel, dtype, terms | {"BLOCK": block}, parity, warps
            )


OFF = {
    "REWEIGHT": False,
    "DUAL": False,
    "KL": 0,
    "ENTROPY": True,
    "BONUS": False,
    "IMPORTANCE": False,
}
ALL = {"REWEIGHT": False, "DUAL": True, "KL": 3, "ENTROPY": True, "BONUS": True, "IMPORTANCE": True}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "figures": ALL | {"GRADIENT": False},
    "clip": OFF | {"GRADIENT": True},
    "clip+k1": OFF | {"KL": 1, "GRADIENT": True},
    "clip+k2": OFF | {"KL": 2, "GRADIENT": True},
    "reweight+importance": OFF | {"REWEIGHT": True, "IMPORTANCE": True, "GRADIENT": True},
    "all": ALL | {"GRADIENT": True},
    "reweight+all": ALL | {"REWEIGHT": True, "DUAL": False, "GRADIENT": True},
}


def _row(
    name: str, kernel: Any, dtype: str | None, constants: dict[str, Any], parity: str, warps: int
) -> Configuration:
    """A row kernel on fp32 logits with gradients in `dtype`."""
    types = {}
    for argument in kernel.arg_names:
        if argument in ROW_INTEGERS:
            types[argument] = "i32"
        elif argument in ROW_FLOATS:
            types[argument] = "fp32"
        elif argument not in constants:
            types[argument] = {"out": f"*{dtype}", "targets": "*i64"}.get(argument, "*fp32")
    aligned = {"logits", "out"} | DIVISIBLE[parity]
    return Configuration(name, kernel, types, constants, frozenset(aligned & types.keys()), warps)


def measure(configuration: Configuration, arch: int = 90) -> Resources:
    """Compile for sm_`arch` and read the machine code. RuntimeError with the tool's words if a tool
    fails.
    """
    # compile for the card's architecture, without a card
    names = configuration.kernel.arg_names
    source = ASTSource(
        fn=configuration.kernel,
        signature={name: configuration.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in configuration.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in configuration.aligned},
    )
    options = {"num_warps": configuration.warps}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    # read registers, stack and spills off the machine code
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("cuobjdump", "-sass", file.name)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    # warps that fit on one multiprocessor
    threads = configuration.warps * 32
    per_thread = -(-found["REG"] // 8) * 8  # registers are handed out in eights
    resident = (
        min(REGISTERS // (per_thread * threads), THREADS // threads, BLOCKS) * configuration.warps
    )
    return Resources(
        configuration.name,
        configuration.warps,
        found["REG"],
        found["STACK"],
        len(re.findall(r"\bLDL\b", code)),
        len(re.findall(r"\bSTL\b", code)),
        compiled.metadata.shared,
        resident,
    )


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(BIN / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout


def table(rows: list[Resources]) -> str:
    """Markdown."""
    lines = [
        "| kernel | warps | registers | stack, bytes | local loads / stores | shared, bytes | "
        "resident warps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        local = f"{row.local_loads} / {row.local_stores}"
        cells = (
            row.name,
            row.warps,
            row.registers,
            row.stack_bytes,
            local,
            row.shared_bytes,
            row.resident_warps,
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        type=int,
        default=90,
        choices=sorted(SHARED_LIMIT),
        help="compute capability x 10",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    rows = [measure(configuration, given.arch) for configuration in configurations()]
    print(f"triton {triton.__version__}, sm_{given.arch}\n\n{table(rows)}")
    if given.json is not None:
        given.json.write_text(
            json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8"
        )
    bad = [row.name for row in rows if row.spills or row.shared_bytes > SHARED_LIMIT[given.arch]]
    if bad:
        sys.exit(f"spills or does not fit: {', '.join(bad)}")


if __name__ == "__main__":
    main()
