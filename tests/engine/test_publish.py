"""Sharded policies published to a real server: it then answers as transformers does with the same
weights.

Before each publication the server holds the other model's weights, and answers otherwise. Every
publication here is also checked by the servers' own checksums of every parameter, since
`verify_every` is 1.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_efr.addresses import status
from megatron_efr.config import TrainConfig
from megatron_efr.errors import EngineError, WeightMismatchError
from megatron_efr.policy import Policy
from megatron_efr.policy.ranks import Ranks
from megatron_efr.publication.build import build_publisher
from megatron_efr.publication.checksums import ChecksumCheck
from megatron_efr.publication.publisher import Publisher
from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.publication.transports import Broadcast, InBand
from megatron_efr.rollout.sglang.engine import SGLangEngine
from megatron_efr.types import Sampling
from megatron_efr.weights.architecture import Architecture
from tests.engine.conftest import SLOTS, STOP, rollout, start
from tests.engine.published import connect, distance, make_policy, make_publisher
from tests.engine.test_parity import asked, exact_logprobs
from tests.families import make_family_folder


def train(
    server: tuple[str, str],
    folders: tuple[Path, Path],
    cases: list[str],
    processes: int = 1,
    ranks: int = 1,
) -> int:
    """Run trainers that publish, one layout and transport after the other; the exit code."""
    url, key = server
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    program = [*(torchrun if processes > 1 else []), "tests.engine.published"]
    done = subprocess.run(
        [sys.executable, "-m", *program, url, str(ranks), ",".join(map(str, folders)), *cases],
        cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1",
            "SGLANG_API_KEY": key},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    print(done.stdout)
    if done.returncode > 0:
        raise AssertionError(done.stderr[-6000:])
    return done.returncode


@pytest.fixture
def engine(
    server: tuple[str, str], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[SGLangEngine]:
    url, key = server
    monkeypatch.setenv("SGLANG_API_KEY", key)
    engine = connect(url, 1, folders[0])
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        (1, ["tensor=1:tensor", "tensor=1:distributed", "tensor=1:disk", "tensor=1:direct"]),
        (
            2,
            [
                "tensor=2:distributed",
                "pipeline=2:tensor",
                "tensor=2:disk",
                "pipeline=2,virtual_pipeline=2:direct",
            ],
        ),
        pytest.param(
            4,
            ["tensor=2,pipeline=2:distributed", "tensor=2,pipeline=2:tensor"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            ["tensor=2:tensor", "pipeline=2:distributed", "pipeline=2:disk"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4, ["tensor=2,pipeline=2:disk", "tensor=2,pipeline=2:direct"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_server_answers_with_the_published_weights(
    processes: int, cases: list[str], server: tuple[str, str], folders: tuple[Path, Path]
) -> None:
    train(server, folders, cases, processes)


def test_a_flush_of_caches_does_not_search_the_whole_server_for_garbage(
    server: tuple[str, str],
) -> None:
    """Two of them are in each publication. They took 0.36 to 0.42 s, and take 0.004 s."""
    url, key = server
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        assert status(f"{url}/flush_cache", 60, key) == 200
        seconds.append(time.perf_counter() - began)
    print(f"flushes took {[round(each, 4) for each in seconds]} s")
    assert min(seconds) < 0.1


@pytest.mark.parametrize("kind", ["tensor", "distributed"])
def test_a_fresh_trainer_repairs_what_a_killed_one_left(
    kind: str, server: tuple[str, str], folders: tuple[Path, Path]
) -> None:
    assert train(server, folders, [f"tensor=1:dying-{kind}"]) == -signal.SIGKILL
    train(server, folders[::-1], [f"tensor=1:{kind}"])


class Garbled(Broadcast):
    """Says once of its second bucket that a matrix is of another shape: the server answers 400,
    half updated.
    """

    delivered = 0

    def deliver(self, prepared: Parcel) -> None:
        self.delivered += 1
        if self.delivered == 2:
            prepared = Parcel(
                [(name, t.T if t.dim() == 2 else t) for name, t in prepared.tensors], prepared.flat
            )
        super().deliver(prepared)


class Refused(Broadcast):
    """Its first bucket is refused each time."""

    def deliver(self, prepared: Parcel) -> None:
        super().deliver(
            Parcel([(name, tensor[..., :1]) for name, tensor in prepared.tensors], None)
        )


class Lying(InBand):
    """Sends other than it was given, be it a name that SGLang does not know: it takes all of it for
    a success.
    """

    def __init__(
        self, engine: SGLangEngine, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]
    ) -> None:
        super().__init__(engine)
        self._change = change

    def prepare(self, parcel: Parcel) -> object:  # type: ignore[override]
        return super().prepare(Parcel([self._change(*pair) for pair in parcel.tensors], None))


def test_a_refused_bucket_has_everything_sent_again(
    engine: SGLangEngine, folders: tuple[Path, Path], ranks: Ranks
) -> None:
    layout = EngineLayout(Architecture.from_folder(folders[0]), 1)
    policy = make_policy(folders[0], "tensor=1", ranks)
    make_publisher(InBand(engine), engine, layout, ranks).publish(
        make_policy(folders[1], "tensor=1", ranks), 1
    )
    garbled = Garbled(engine, "127.0.0.1", "gloo")
    make_publisher(garbled, engine, layout, ranks).publish(policy, 2)
    assert garbled.delivered > 4  # the second attempt began anew
    assert distance(engine, folders[0]) <= 1e-5
    garbled.abandon()


def test_a_server_that_refuses_twice_is_named_and_repaired_later(
    engine: SGLangEngine, folders: tuple[Path, Path], ranks: Ranks
) -> None:
    layout = EngineLayout(Architecture.from_folder(folders[0]), 1)
    policy = make_policy(folders[1], "tensor=1", ranks)
    with pytest.raises(EngineError, match=engine.urls[0]):
        make_publisher(Refused(engine, "127.0.0.1", "gloo"), engine, layout, ranks).publish(
            policy, 3
        )
    assert engine.version == -1
    make_publisher(InBand(engine), engine, layout, ranks).publish(policy, 4)
    assert engine.version == 4
    assert distance(engine, folders[1]) <= 1e-5


def test_a_name_that_sglang_ignored_stops_the_run(
    engine: SGLangEngine, folders: tuple[Path, Path], ranks: Ranks
) -> None:
    layout = EngineLayout(Architecture.from_folder(folders[0]), 1)
    make_publisher(InBand(engine), engine, layout, ranks).publish(
        make_policy(folders[0], "tensor=1", ranks), 5
    )
    lying = Lying(engine, lambda name, tensor: (name.replace("model.norm", "model.nrom"), tensor))
    with pytest.raises(WeightMismatchError, match=r"model\.norm\.weight is not what was sent"):
        make_publisher(lying, engine, layout, ranks).publish(
            make_policy(folders[1], "tensor=1", ranks), 6
        )
    assert engine.version == -1


@pytest.mark.slow
def test_ranks_of_a_server_take_whole_tensors_and_their_own_slices_alike(tmp_path: Path) -> None:
    # an MLP of 32 x 2 x 2: SGLang on a CPU would widen another
    sizes = {"intermediate_size": 128}
    folders = (
        make_family_folder(tmp_path / "0", "qwen2", seed=0, **sizes),
        make_family_folder(tmp_path / "1", "qwen2", seed=1, **sizes),
    )
    launcher, urls = start(tmp_path / "engines", rollout(tp=2), folders[0])
    with launcher:
        train((urls[0], launcher.key), folders, ["tensor=1:tensor", "tensor=1:direct"], ranks=2)
        train(
            (urls[0], launcher.key),
            folders,
            ["tensor=2:distributed", "tensor=2:direct"],
            processes=2,
            ranks=2,
        )


@pytest.mark.slow
def test_a_mixture_in_bf16_is_held_to_every_bit(tmp_path: Path, ranks: Ranks) -> None:
    folders = [
        make_family_folder(tmp_path / str(i), "qwen3-moe", seed=i, dtype=torch.bfloat16)
        for i in (0, 1)
    ]
    architecture = Architecture.from_folder(folders[0])
    launcher, urls = start(tmp_path / "engines", rollout(), folders[1], dtype="bfloat16")
    with launcher:
        data = {"datasets": [{"path": "none"}], "prompt": {"template": "{question}"}}
        config = TrainConfig.model_validate(
            {
                "name": "bf16", "model": {"path": str(folders[0]), "dtype": "bfloat16"},
                "data": data,
                "rollout": {"engine": "sglang", "urls": urls}, "optimizer": {"lr": 1e-3},
            }
        )  # fmt: skip
        limits = config.rollout.timeouts
        engine = SGLangEngine(urls, architecture, SLOTS, limits, key=launcher.key, dtype="bfloat16")
        policy = Policy(config.model, config.parallel, config.optimizer, ranks, updates=1, seed=0)
        publisher = build_publisher(
            config, architecture, engine, ranks.cpu_world, lambda urls: None
        )
        publisher.publish(policy, 1)
        apart = [mean_difference(engine, folder) for folder in folders]
        print(
            f"mean |server - transformers|: {apart[0]:.1e} from its weights, {apart[1]:.1e} from "
            "the other"
        )
        assert apart[0] < apart[1] / 20
        name = "model.layers.1.mlp.experts.3.gate_proj.weight"
        lying = Lying(engine, lambda n, tensor: (n, one_ulp_off(tensor) if n == name else tensor))
        publisher = Publisher(
            lying, engine, ranks.cpu_world, verify_every=1,
            check=lambda: ChecksumCheck(EngineLayout(architecture, 1), torch.bfloat16, "sha256"),
        )  # fmt: skip
        with pytest.raises(
            WeightMismatchError, match=r"layers\.1\.mlp\.experts\.w13_weight is not what was sent"
        ):
            publisher.publish(policy, 2)
        engine.close()


def one_ulp_off(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with one bit of one of its numbers changed."""
    changed = tensor.clone()
    changed.view(torch.int16)[5, 7] ^= 1
    return changed


def mean_difference(engine: SGLangEngine, folder: Path) -> float:
    """Between the log-probs that the server says of what it drew, and transformers' in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for group in engine.generate(asked(6, 2), Sampling(1.0, 1.0, 40, (STOP,))):
        for response in group.responses:
            exact = exact_logprobs(model, group.prompt, response.tokens, 1.0)
            found.append((exact - torch.tensor(response.logprobs)).abs())
    return float(torch.cat(found).mean())
