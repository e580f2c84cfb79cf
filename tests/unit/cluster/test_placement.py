"""Placement: ranks, engines, ports and environments for 1, 2 and 4 hosts of 8 GPUs, as the scripts
print them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_efr.cluster.commands import UNSET, commands
from megatron_efr.cluster.network import interface_towards
from megatron_efr.cluster.placement import ENGINE_PORT, Placement, place
from megatron_efr.config import ConfigError, RolloutConfig
from megatron_efr.errors import UserError
from megatron_efr.rollout.servers.host import Host
from megatron_efr.rollout.servers.launcher import server_environment

ROOT = Path(__file__).parents[3]
TORCHRUNS = {
    "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    "GROUP_RANK": "0",
    "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}  # fmt: skip


def hosts(count: int) -> list[str]:
    return [f"node{i + 1}" for i in range(count)]


def sglang(**fields: object) -> RolloutConfig:
    return RolloutConfig(**{"engine": "sglang", "placement": "colocated"} | fields)  # type: ignore[arg-type]


def check_seats(placement: Placement, count: int) -> None:
    """Every GPU has one seat of a kind at most, every port one engine, ranks count up host by
    host.
    """
    assert [rank.rank for rank in placement.ranks] == list(range(len(placement.ranks)))
    seats = [(rank.host, rank.gpu) for rank in placement.ranks]
    assert len(set(seats)) == len(seats)
    engine_gpus = [(engine.host, gpu) for engine in placement.engines for gpu in engine.gpus]
    assert len(set(engine_gpus)) == len(engine_gpus)
    assert len({engine.url for engine in placement.engines if engine.url}) == len(placement.urls)
    assert [engine.index for engine in placement.engines] == list(range(len(placement.engines)))
    assert not {engine.host for engine in placement.engines if engine.url} & set(
        placement.trainer_hosts
    )
    assert set(placement.hosts) == set(hosts(count))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_colocated_engines_cover_the_ranks_gpus(count: int, tp: int) -> None:
    placement = place(hosts(count), 8, sglang(tp=tp))
    check_seats(placement, count)
    assert len(placement.ranks) == 8 * count
    assert len(placement.engines) == 8 * count // tp
    assert {(e.host, gpu) for e in placement.engines for gpu in e.gpus} == {
        (r.host, r.gpu) for r in placement.ranks
    }
    for engine in placement.engines:  # as `tensor` hands its buckets over
        assert [rank.gpu for rank in placement.ranks[engine.index * tp :][:tp]] == list(engine.gpus)
    assert placement.urls == []
    assert placement.rendezvous == "node1:29500"


@pytest.mark.parametrize(
    ("count", "engines", "tp", "ranks"),
    [(1, 2, 2, 4), (2, 8, 1, 8), (2, 2, 4, 8), (4, 4, 4, 16), (4, 1, 8, 24)],
)
def test_engines_apart_share_no_gpu_with_ranks(
    count: int, engines: int, tp: int, ranks: int
) -> None:
    placement = place(hosts(count), 8, sglang(tp=tp, engines=engines, placement="apart"))
    check_seats(placement, count)
    assert len(placement.ranks) == ranks
    assert len(placement.engines) == engines
    assert not {(e.host, g) for e in placement.engines for g in e.gpus} & {
        (r.host, r.gpu) for r in placement.ranks
    }
    if count == 1:
        assert placement.urls == [], "ranks on their host start them"
    else:
        assert {e.port for e in placement.engines} == set(range(ENGINE_PORT, ENGINE_PORT + 8 // tp))


def test_hosts_are_taken_in_the_order_in_which_torchrun_ranks_them() -> None:
    placement = place(["node2", "node10", "node1"], 8, RolloutConfig())
    assert placement.trainer_hosts == ("node1", "node10", "node2")
    assert placement.ranks[8].host == "node10"
    assert placement.engines == ()


@pytest.mark.parametrize(
    ("count", "rollout", "says"),
    [
        (
            1,
            sglang(tp=3),
            r"rollout.tp: 3 does not divide the 8 ranks of a host; one of \[1, 2, 4, 8\] would",
        ),
        (
            2,
            sglang(engines=8),
            "8, and colocated there is one for every rollout.tp = 1 of 16 ranks: 16; leave it out",
        ),
        (1, sglang(tp=4, engines=2, placement="apart"), "leave none of 8 for the trainer"),
        (
            2,
            sglang(tp=1, engines=4, placement="apart"),
            r"not whole hosts of 8 .* one of \[8\] would fit",
        ),
        (
            2,
            sglang(tp=4, engines=4, placement="apart"),
            r"that leave one of 2 for the trainer; one of \[2\]",
        ),
    ],
)
def test_a_placement_that_does_not_divide_is_refused_with_what_would(
    count: int, rollout: RolloutConfig, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        place(hosts(count), 8, rollout)


def test_an_engines_environment_has_nothing_of_torchruns_and_its_own_gpus() -> None:
    seen = server_environment(
        os.environ | TORCHRUNS | {"CUDA_VISIBLE_DEVICES": "4,5"}, on_gpu=True, tp=2
    )
    assert not seen.keys() & TORCHRUNS.keys()
    assert seen["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert set(UNSET) == {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}


def test_the_trainer_is_told_of_engines_elsewhere_and_starts_those_of_its_hosts() -> None:
    placement = place(["a", "b"], 8, sglang(tp=4, engines=2, placement="apart"))
    trainer, *engines = commands(placement, "run.yaml", ["seed=1"], "run")
    assert [command.environment["CUDA_VISIBLE_DEVICES"] for command in engines] == [
        "0,1,2,3",
        "4,5,6,7",
    ]
    assert trainer.words[-2] == "rollout.urls=[http://b:30000,http://b:30001]"
    for rollout in (sglang(tp=2), sglang(tp=2, engines=2, placement="apart")):
        [alone] = commands(place(["a"], 8, rollout), "run.yaml", [], "run")
        assert not any("rollout.urls" in word for word in alone.words)
        assert "CUDA_VISIBLE_DEVICES" not in alone.environment, (
            "the engines of this host would not see their GPUs"
        )


@pytest.mark.parametrize(
    ("rollout", "agrees"),
    [
        (sglang(tp=2), False),
        (sglang(tp=2, engines=2, placement="apart"), True),
        (sglang(tp=8, engines=1, placement="apart", urls=["http://a:30000"]), True),
        (RolloutConfig(), False),
    ],
)
def test_where_weights_go_over_nccl_the_trainer_sets_of_it_what_sglang_sets_unless_the_host_has(
    rollout: RolloutConfig, agrees: bool
) -> None:
    [trainer] = commands(place(["a"], 8, rollout), "run.yaml", [], "run")
    assert ("NCCL_CUMEM_ENABLE=0 NCCL_NVLS_ENABLE=0 " in str(trainer)) is agrees
    host = {
        "NCCL_CUMEM_ENABLE": "1",
        "OMP_NUM_THREADS": "8",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    within = trainer.within(host)
    assert (within["NCCL_CUMEM_ENABLE"], within.get("NCCL_NVLS_ENABLE")) == (
        "1",
        "0" if agrees else None,
    )
    assert within["OMP_NUM_THREADS"] == "1"
    assert not within.keys() & set(UNSET)


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("placement", ["colocated", "apart"])
def test_the_ranks_of_a_host_start_the_engines_that_the_placement_shows(
    hosts: int, placement: str
) -> None:
    rollout = sglang(
        tp=2, placement=placement, engines=None if placement == "colocated" else 2 * hosts
    )
    world = {"WORLD_SIZE": str(4 * hosts), "LOCAL_WORLD_SIZE": "4"}
    seats = [
        Host.of_this_process(world | {"RANK": str(rank)}).engine_gpus(rollout)
        for rank in range(0, 4 * hosts, 4)
    ]
    assert seats == [[(0, 1), (2, 3)] if placement == "colocated" else [(4, 5), (6, 7)]] * hosts
    assert Host.of_this_process({}).engine_gpus(sglang()) == [(0,)]
    assert Host.of_this_process({}).engine_gpus(RolloutConfig()) == []


def test_engines_that_do_not_divide_over_hosts_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"rollout.engines: 3 do not divide over 2 hosts; .* a multiple of 2"
    ):
        Host(count=2, ranks=4).engine_gpus(sglang(engines=3, placement="apart"))
    with pytest.raises(ConfigError, match="5 ranks, 3 of them on this host"):
        Host.of_this_process({"WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "3", "RANK": "0"})


# -- the scripts
# --------------------------------------------------------------------------------------------------


def dry_run(script: str, *arguments: str, **environment: str) -> list[str]:
    """Output of a script, with variables set that an outer torchrun might leave behind."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments, "--dry-run"],
        env=os.environ
        | TORCHRUNS
        | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize(
    ("nodes", "example"), [("1", "paper_1.5b"), ("2", "paper_7b"), ("4", "r1_32b_4nodes")]
)
def test_the_slurm_script_prints_every_nodes_part(nodes: str, example: str) -> None:
    lines = dry_run("train_slurm.sbatch", f"examples/{example}.yaml", NODES=nodes)
    commands = [shlex.split(line.split("$ ", 1)[1]) for line in lines if "$ " in line]
    trainers = [words for words in commands if "megatron_efr.torchrun" in words]
    engines = [words for words in commands if "megatron_efr.cluster.serve" in words]
    assert len(trainers) == int(nodes)
    for words in trainers:
        assert option(words, "--nnodes") == nodes
        assert option(words, "--nproc-per-node") == "8"
        assert (option(words, "--rdzv-backend"), option(words, "--rdzv-endpoint")) == (
            "c10d",
            "node1:29500",
        )
        assert not any("rollout.urls" in word for word in words), (
            "each host's first rank starts its engines"
        )
    assert sorted(option(words, "--local-addr") for words in trainers) == hosts(int(nodes))
    assert engines == []
    seats = [
        re.fullmatch(r"(\S+): engine (\d+) on GPUs (\S+) started by rank (\d+)", line)
        for line in lines
    ]
    seated = [m.groups() for m in seats if m]
    assert [int(index) for _, index, _, _ in seated] == list(range(len(seated)))
    assert {(host, int(rank)) for host, _, _, rank in seated} == {
        (h, 8 * i) for i, h in enumerate(hosts(int(nodes)))
    }
    assert [gpu for _, _, gpus, _ in seated for gpu in gpus.split(",")] == list("01234567") * int(
        nodes
    )
    ranks = [
        re.fullmatch(r"(\S+): ranks (\d+)-(\d+) on GPUs 0,1,2,3,4,5,6,7", line) for line in lines
    ]
    assert [m.groups() for m in ranks if m] == [
        (h, str(8 * i), str(8 * i + 7)) for i, h in enumerate(hosts(int(nodes)))
    ]


def test_the_slurm_script_prints_engines_on_nodes_of_their_own() -> None:
    apart = ["rollout.placement=apart", "rollout.engines=4", "rollout.tp=4"]
    lines = dry_run("train_slurm.sbatch", "examples/paper_7b.yaml", *apart, NODES="4")
    commands = {
        line.split("$ ", 1)[0]: shlex.split(line.split("$ ", 1)[1])
        for line in lines
        if "$ " in line
    }
    assert list(commands) == hosts(4)
    for host in hosts(2):
        assert option(commands[host], "--nnodes") == "2"
        urls = [f"http://node{n}:{port}" for n in (3, 4) for port in (30000, 30001)]
        assert commands[host][-2] == f"rollout.urls=[{','.join(urls)}]"
    assert lines[:4] == [
        "node1: ranks 0-7 on GPUs 0,1,2,3,4,5,6,7",
        "node2: ranks 8-15 on GPUs 0,1,2,3,4,5,6,7",
        "node3: engine 0 on GPUs 0,1,2,3 at http://node3:30000",
        "node3: engine 1 on GPUs 4,5,6,7 at http://node3:30001",
    ]
    for host in ("node3", "node4"):
        assert "megatron_efr.cluster.serve" in commands[host]
        assert not any(word.split("=")[0] in TORCHRUNS for word in commands[host])


def test_a_host_of_several_meets_the_others_over_the_interface_by_which_it_reaches_them() -> None:
    def settings(*where: str) -> list[list[str]]:
        lines = dry_run(
            "train_slurm.sbatch", "examples/paper_7b.yaml", *where, HOSTS="127.0.0.1,127.0.0.2"
        )
        return [line.split("$ ", 1)[1].split(" /")[0].split() for line in lines if "$ " in line]

    [mine, other] = settings("--host", "127.0.0.1")
    assert {"GLOO_SOCKET_IFNAME=lo", "NCCL_SOCKET_IFNAME=lo"} == set(mine) - set(other)
    assert settings() == [other, other], "where it is not known which host this is"
    with pytest.raises(UserError, match=r"--hosts: nowhere\.invalid is not reached from here: "):
        interface_towards("nowhere.invalid")


def test_the_node_script_and_the_engines_script_print_theirs() -> None:
    lines = dry_run("train_node.sh", "examples/paper_7b.yaml")
    assert lines[0] == "127.0.0.1: ranks 0-7 on GPUs 0,1,2,3,4,5,6,7"
    assert [line.endswith("started by rank 0") for line in lines[1:-1]] == [True] * 8
    assert sum("megatron_efr.cluster.serve" in line for line in lines) == 0
    assert sum("megatron_efr.torchrun" in line for line in lines) == 1
    served = dry_run(
        "serve_engines.sh",
        "examples/r1_32b_4nodes.yaml",
        HOST="10.0.0.7",
        SGLANG_API_KEY="secret",
        GPUS="8",
    )
    assert [line.split("$ ")[1].split()[0] for line in served if "$ " in line] == [
        "CUDA_VISIBLE_DEVICES=0,1,2,3",
        "CUDA_VISIBLE_DEVICES=4,5,6,7",
    ]
    assert "secret" not in "\n".join(served)


def test_engines_without_a_key_or_on_a_public_address_are_refused(tmp_path: Path) -> None:
    script = ["bash", str(ROOT / "launch/serve_engines.sh"), "examples/paper_7b.yaml"]
    bare = {name: value for name, value in os.environ.items() if name != "SGLANG_API_KEY"}
    done = subprocess.run(
        script, env=bare | {"HOST": "10.0.0.7"}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "SGLANG_API_KEY" in done.stderr
    serve = [
        sys.executable,
        "-m",
        "megatron_efr.cluster.serve",
        "examples/paper_7b.yaml",
        "--port",
        "30000",
    ]
    environment = os.environ | {"SGLANG_API_KEY": "secret"}
    done = subprocess.run(
        [*serve, "--host", "8.8.8.8"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert "8.8.8.8 is a public address" in done.stderr


SRUN = """#!/usr/bin/env bash
echo "$@" >> {log}
case "$*" in
    *"--nodelist=node2 "*) trap 'echo engines-ended >> {log}; exit 0' TERM; while :; do sleep 0.05; done ;;
    *) sleep 0.5; exit {code} ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in show) printf 'node1\\nnode2\\n' ;; requeue) echo "requeue $2" >> {log} ;; esac
"""


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (1, False), (0, False)])
def test_the_slurm_job_goes_back_into_the_queue_only_where_the_run_asks_for_it(
    tmp_path: Path, code: int, requeued: bool
) -> None:
    """The batch script itself, under an srun and a scontrol that note what they are asked."""
    log = tmp_path / "log"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text.format(log=log, code=code))
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    apart = ["rollout.placement=apart", "rollout.engines=8"]
    script = ["bash", str(ROOT / "launch/train_slurm.sbatch"), "examples/paper_7b.yaml", *apart]
    done = subprocess.run(
        script, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    text = log.read_text()
    assert ("requeue 7" in text) == requeued
    engines, trainer = (line for line in sorted(text.splitlines()) if line.startswith("--nodes"))
    if "--nodelist=node2 " not in engines:
        engines, trainer = trainer, engines
    assert "--nodelist=node2 " in engines
    assert "--nodelist=node1 " in trainer
    assert "--port 29507" in trainer
    assert "engines-ended" in text, "engines were left behind"
