"""A SLURM array with one task for each model of a sweep."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

_SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}/task-%a.txt
#SBATCH --signal=USR1@1800
{options}#
# One task for each model of a sweep; the task that ends last writes the table and the report.
# Half an hour before the time limit a run saves and ends with {requeue}; its task is queued again.
set -euo pipefail
cd {place}
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
code=0
srun --ntasks=1 {command} --member "$SLURM_ARRAY_TASK_ID" || code=$?
restarts=${{SLURM_RESTART_COUNT:-0}}
if [ "$code" -eq {requeue} ] && [ "$restarts" -lt "${{MOST_REQUEUES:-100}}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def array_script(
    name: str, tasks: int, command: Sequence[str], logs: Path, options: Sequence[str], requeue: int
) -> str:
    """The batch script: `command` with `--member N` for each N below `tasks`, run from the present
    folder.

    `options` are sbatch's, and stand last, so that they win. An exit code of `requeue` puts a task
    back into the queue.
    """
    return _SCRIPT.format(
        name=name.replace("/", "-"),
        last=tasks - 1,
        logs=_written(logs.resolve()),
        options="".join(f"#SBATCH {option}\n" for option in options),
        place=shlex.quote(str(Path.cwd())),
        command=shlex.join(command),
        requeue=requeue,
    )


def _written(path: Path) -> str:
    """A path as sbatch reads it in a directive: only quotes keep a space in it, a backslash keeps
    any other sign, and `%` is a symbol.
    """
    return '"' + re.sub(r'(["#\\])', r"\\\1", str(path).replace("%", "%%")) + '"'
