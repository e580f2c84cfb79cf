"""`efr doctor`: what this machine has and lacks, for any run or for the one that CONFIG
describes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from megatron_efr.addresses import KEY
from megatron_efr.arguments import PORTS, run, within
from megatron_efr.checkpoint.model_source import find_model
from megatron_efr.cluster.placement import RENDEZVOUS_PORT
from megatron_efr.config import (
    DpoConfig,
    EvaluateConfig,
    RolloutConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)
from megatron_efr.doctor import machine
from megatron_efr.doctor.engine import check_engine, check_router, check_servers
from megatron_efr.doctor.finding import Finding, missing
from megatron_efr.doctor.model import check_data, check_prompt, check_weights
from megatron_efr.doctor.packages import (
    check_apex,
    check_packages,
    check_transformer_engine,
    requirements,
)
from megatron_efr.doctor.programs import load_any
from megatron_efr.errors import UserError
from megatron_efr.memory import BYTES, checkpoint_bytes, parameter_count
from megatron_efr.weights.architecture import Architecture

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
ROOM = 2 * 2**30  # bytes of disk for a run's records, if the model is not known


def examine(config: RunConfig | None, ports: Sequence[int]) -> Iterator[Finding]:
    """Every finding, in the order in which they would stop a run; what `config` needs and lacks is
    a problem.
    """
    # what is installed, and what the configuration asks of it
    yield from check_packages()
    yield from machine.check_gpus(needed=config is not None and not fits_host(config))
    yield machine.check_triton(needed=config is not None and config.model.kernels == "triton")
    yield from check_transformer_engine(
        needed=config is not None and config.model.layers == "transformer_engine"
    )
    yield check_apex()
    # the engine, its servers and router
    rollout = (
        config.rollout if isinstance(config, TrainConfig | EvaluateConfig) else RolloutConfig()
    )
    pins = {
        r.name: next(iter(r.specifier)).version
        for r in requirements()
        if r.name in ("sglang", "sglang-router")
    }
    starts = not rollout.embedded and not rollout.urls
    yield from check_engine(rollout.python, pins.get("sglang"), needed=starts)
    if rollout.router:
        yield check_router(rollout.python, pins.get("sglang-router"))
    yield from check_servers(rollout.urls, os.environ.get(KEY))
    # the run itself: model, data, disk
    if config is not None:
        yield from check_run(config)
    else:
        yield machine.check_disk(Path("runs"), ROOM, "a small run")
    # the machine
    on_gpu = torch.cuda.is_available()
    yield machine.check_shared_memory(needed=config is not None and on_gpu)
    yield machine.check_threads(os.environ, len(os.sched_getaffinity(0)))
    apart = isinstance(rollout, RolloutConfig) and rollout.placement == "apart"
    if on_gpu and not rollout.embedded and apart:
        yield machine.check_nccl_settings(os.environ)
    for port in ports:
        yield machine.check_port(
            port, "torchrun's rendezvous" if port == RENDEZVOUS_PORT else "asked for"
        )


def fits_host(config: RunConfig) -> bool:
    """True unless the model, or what training keeps of it, takes more than this machine's memory: a
    CPU does whatever a GPU does, Transformer Engine's layers and Triton's kernels excepted.
    """
    try:
        architecture = Architecture.from_folder(config.model.path)
    except UserError:  # a checkpoint, or not there, which is said elsewhere
        return True
    held = parameter_count(architecture) * BYTES[config.model.dtype]
    if not isinstance(config, EvaluateConfig):
        held = checkpoint_bytes(architecture, config.model.dtype, config.model.lora)
    return held <= psutil.virtual_memory().total


def check_run(config: RunConfig) -> Iterator[Finding]:
    """Look at what this run, or this evaluation, reads and writes."""
    needed = ROOM
    what = "records"
    model = config.model
    checkpoint = None
    # config.json tells what the weights, the prompts and the disk have to fit
    try:
        if isinstance(config, EvaluateConfig):  # perhaps of a checkpoint, or of a run's newest
            source = find_model(config.model, config.seed, config.template)
            model, checkpoint = source.start, source.checkpoint
        architecture = Architecture.from_folder(model.path)
    except UserError as error:
        yield Finding(
            "model",
            "problem",
            str(error),
            "model.path=FOLDER, a Hugging Face folder on this machine",
        )
    else:
        yield Finding("model", "ok", f"{architecture.model_type} in {config.model.path}")
        if checkpoint is None:
            yield check_weights(model, architecture, config.seed)
        yield check_prompt(config.model_copy(update={"model": model}), architecture)
        # one more than are kept: the oldest goes when the new one is whole
        if isinstance(config, TrainConfig | SftConfig | DpoConfig):
            each = checkpoint_bytes(architecture, config.model.dtype, config.model.lora)
            needed += (config.checkpoint.keep + 1) * each
            what = f"{config.checkpoint.keep} checkpoints, one being written, and records"
    yield check_data(config)
    yield machine.check_disk(config.folder, needed, what)
    # the run would import it only after the model is built
    wandb = (
        config.observe.wandb if isinstance(config, TrainConfig | SftConfig | DpoConfig) else None
    )
    if wandb is not None and importlib.util.find_spec("wandb") is None:
        yield missing(
            "wandb",
            "observe.wandb is set, and it is not installed",
            "pip install 'megatron-efr[wandb]'",
            True,
        )


def table(findings: Sequence[Finding]) -> Table:
    """The findings as they are printed."""
    made = Table("", "found", "what to do", title="efr doctor", title_justify="left")
    for finding in findings:
        style = STYLES[finding.verdict]
        subject = f"[{style}]{finding.verdict:8}[/]{finding.subject}"
        made.add_row(subject, finding.found.replace("[", r"\["), finding.advice.replace("[", r"\["))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `efr doctor`."""
    parser = argparse.ArgumentParser(
        prog="efr doctor", description="What this machine has and lacks for a run."
    )
    parser.add_argument(
        "config", nargs="?", help="YAML file of the run; 1 if the machine lacks what it needs"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace the file's"
    )
    port = within(int, *PORTS)
    parser.add_argument(
        "--port", type=port, action="append", help=f"a port to look at (default: {RENDEZVOUS_PORT})"
    )
    given = parser.parse_intermixed_args(argv)
    config = None if given.config is None else load_any(given.config, given.overrides)
    findings = list(examine(config, given.port or [RENDEZVOUS_PORT]))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(findings))
    problems = sum(finding.verdict == "problem" for finding in findings)
    console.print(f"{problems} problem{'s' * (problems != 1)}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run(main)
