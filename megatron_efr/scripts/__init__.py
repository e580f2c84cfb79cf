"""Scripts: a response made step by step, drawn, forced or branched; every kind by its name."""

from megatron_efr.scripts.exits import Exits as Exits
from megatron_efr.scripts.kinds import Budget as Budget
from megatron_efr.scripts.kinds import EarlyExit as EarlyExit
from megatron_efr.scripts.kinds import Forks as Forks
from megatron_efr.scripts.kinds import Kind as Kind
from megatron_efr.scripts.kinds import Opened as Opened
from megatron_efr.scripts.kinds import Plain as Plain
from megatron_efr.scripts.named import SCRIPTS as SCRIPTS
from megatron_efr.scripts.named import build as build
from megatron_efr.scripts.named import decode as decode
from megatron_efr.scripts.named import encode as encode
from megatron_efr.scripts.named import plain as plain
from megatron_efr.scripts.rounds import Rounds as Rounds
