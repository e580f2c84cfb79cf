"""`efr plan`: memory and time of a run, from its configuration and the shape of its model alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_efr import arguments
from megatron_efr.config import TrainConfig
from megatron_efr.planning import host
from megatron_efr.planning.gpus import GIB, Case, describe, remedies


def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan; exit code 1 if it does not fit, after what would."""
    parser = arguments.parser(
        "plan", "Memory and time of a run, phase by phase, before anything is downloaded."
    )
    some = arguments.within(int, 1)
    # machines that need not be there
    parser.add_argument("--nodes", type=some, default=1, help="machines (default: 1)")
    parser.add_argument(
        "--gpus",
        type=arguments.within(int, 0),
        help="GPUs of a machine (default: 8, or 0 with the embedded engine: a plan for this CPU)",
    )
    parser.add_argument(
        "--memory-gib", type=arguments.within(float, 1), default=80, help="of a GPU (default: 80)"
    )
    # on a CPU time goes by what is drawn, not by what may be drawn
    parser.add_argument(
        "--tokens", type=some, help="on a CPU: a response's mean (default: rollout.max_new_tokens)"
    )
    parser.add_argument(
        "--prompt",
        type=some,
        help="on a CPU: a prompt's mean (default: 128, or data.prompt.max_tokens if that is less)",
    )
    parser.set_defaults(log_level="warning")  # what the measured models log is no part of the plan
    given = parser.parse_intermixed_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    with arguments.configured(TrainConfig, given) as config:
        # the embedded engine decodes on this CPU, and the whole run with it
        gpus = (0 if config.rollout.embedded else 8) if given.gpus is None else given.gpus
        if gpus == 0:
            prompt = given.prompt or min(128, config.data.prompt.max_tokens)
            fits = on_cpu(
                host.HostPlan(config, prompt, given.tokens or config.rollout.max_new_tokens),
                console,
            )
        else:
            world = given.nodes * gpus
            memory = int(given.memory_gib * GIB)
            fits = on_gpus(Case(given.config, tuple(given.overrides), world, memory), console)
    if not fits:
        sys.exit(1)


def on_cpu(plan: host.HostPlan, console: Console) -> bool:
    """Print what an iteration takes on this machine: its time too, if it fits."""
    # before anything is measured, which leaves memory behind in this process
    fits = host.fits(plan)
    for line in host.describe(plan):
        console.print(line)
    if fits:
        console.print(host.told(plan))
    else:
        console.print(
            "It does not fit. A smaller train.micro_batch_tokens or rollout.slots, or adapters "
            "(model.lora), take less"
        )
    return fits


def on_gpus(case: Case, console: Console) -> bool:
    """Print what the run takes on each GPU, and the fewest changes that make it fit if it does
    not.
    """
    for line in describe(case):
        console.print(line)
    if case.fits:
        return True
    choices = remedies(case)
    console.print(
        "It does not fit. Any of these lines would:"
        if choices
        else "It does not fit, nor would three changes"
    )
    for choice in choices:
        quoted = (f"'{override}'" if " " in override else override for override in choice)
        console.print("  " + " ".join(quoted), markup=False)
    return False


if __name__ == "__main__":
    arguments.run(main)
