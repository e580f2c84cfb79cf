"""The plan by which shards become whole tensors, its model of time, and what SGLang is sent:
without processes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_efr.errors import WeightMismatchError
from megatron_efr.publication.bucket_plan import BucketPlan, Held
from megatron_efr.publication.checksums import ChecksumCheck, Hashing, fmix32
from megatron_efr.publication.reshard import Parcel
from megatron_efr.publication.sglang_layout import EngineLayout
from megatron_efr.publication.timing import Bandwidths, seconds
from megatron_efr.publication.transports import encode
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import FolderWeights
from megatron_efr.weights.mapping import WeightMapping
from tests.families import make_family_folder


def held(mapping: WeightMapping, source: FolderWeights, ranks: int) -> dict[int, Held]:
    """Shards that tensor-parallel ranks hold, from the folder itself."""
    found = {}
    for rank in range(ranks):
        shards = {}
        for name in mapping.parameters():
            shard = mapping.to_megatron(
                name, {hf: source[hf] for hf in mapping.sources(name)}, rank
            )
            shards[name] = (tuple(shard.shape), shard.dtype)
        found[rank] = Held(rank, shards)
    return found


@pytest.fixture
def plan(untied_model: Path) -> BucketPlan:
    architecture = Architecture.from_folder(untied_model)
    mapping = WeightMapping(architecture, 2)
    return BucketPlan.derive(
        held(mapping, FolderWeights(untied_model, architecture), 2), mapping, limit=50_000
    )


def test_a_plan_has_every_parameter_once_in_the_mappings_order(
    plan: BucketPlan, untied_model: Path
) -> None:
    names = [entry.name for bucket in plan.buckets for entry in bucket.entries]
    assert names == WeightMapping(Architecture.from_folder(untied_model), 2).parameters()


def test_buckets_keep_their_limit_and_larger_parameters_travel_alone(plan: BucketPlan) -> None:
    assert plan.largest == 2 * 96 * 64 * 4  # gate and up
    for bucket in plan.buckets:
        assert bucket.nbytes <= plan.limit or len(bucket.entries) == 1
    assert sum(bucket.nbytes <= plan.limit for bucket in plan.buckets) > 5
    small = BucketPlan(plan.buckets, limit=1000)
    assert not small.overlaps(plan.buckets[1], plan.buckets[2], 0)
    assert plan.overlaps(plan.buckets[1], plan.buckets[2], 0)


def test_what_is_not_split_comes_from_one_rank_and_not_to_itself(plan: BucketPlan) -> None:
    for bucket in plan.buckets:
        for entry in bucket.entries:
            assert entry.holders == ((0,) if "layernorm" in entry.name else (0, 1))
        assert all(
            len(entry.holders) == 2 for entries in bucket.messages(0).values() for entry in entries
        )


def test_a_shard_that_nobody_holds_is_named(untied_model: Path) -> None:
    architecture = Architecture.from_folder(untied_model)
    mapping = WeightMapping(architecture, 2)
    split = held(mapping, FolderWeights(untied_model, architecture), 2)
    with pytest.raises(
        RuntimeError, match=r"nobody holds tensor-parallel shard 1 of embedding\.word_embeddings"
    ):
        BucketPlan.derive({0: split[0]}, mapping)


def test_the_model_of_time_is_the_sum_of_its_parts(plan: BucketPlan) -> None:
    whole = sum(bucket.nbytes for bucket in plan.buckets)
    never = float("inf")
    assert seconds(plan, Bandwidths(never, never, 1e6)) == pytest.approx(whole / 1e6)
    assert seconds(plan, Bandwidths(never, never, never, bucket_s=0.5)) == pytest.approx(
        0.5 * len(plan.buckets)
    )
    moved = sum(sum(e.shard_bytes for e in b.messages(0).get(1, [])) for b in plan.buckets)
    assert seconds(plan, Bandwidths(1e6, never, never)) == pytest.approx(moved / 1e6)
    staged = sum(b.staged(0) for b in plan.buckets)
    alone = sum(b.nbytes for b in plan.buckets if b.is_at(0))
    copied = whole - moved + staged - alone  # rank 0's own, and what does not arrive in its place
    assert seconds(plan, Bandwidths(never, 1e6, never)) == pytest.approx(copied / 1e6)
    apart = seconds(plan, Bandwidths(1e6, never, 1e6, overlap=0.0))
    assert apart == pytest.approx((whole + moved) / 1e6)
    assert seconds(plan, Bandwidths(1e6, never, 1e6)) < apart - 0.7 * moved / 1e6


def test_every_rank_that_wants_all_packs_its_shards_and_puts_all_together(plan: BucketPlan) -> None:
    never = float("inf")
    whole = sum(bucket.nbytes for bucket in plan.buckets)
    assert seconds(plan, Bandwidths(1e6, never, never), None) == pytest.approx(whole / 1e6)
    packed = sum(
        max(sum(e.shard_bytes for e in m) for m in b.messages(None).values()) for b in plan.buckets
    )
    together = sum(bucket.nbytes for bucket in plan.buckets if bucket.nbytes <= plan.limit)
    assert seconds(plan, Bandwidths(never, 1e6, never), None) == pytest.approx(
        (packed + together) / 1e6
    )


def test_shards_land_where_their_parts_are_runs_of_bytes_in_whole_tensors(
    plan: BucketPlan, untied_model: Path
) -> None:
    beside = {
        e.name.split(".", 3)[-1] for bucket in plan.buckets for e in bucket.entries if not e.lands
    }
    # one KV group a rank: qkv lands
    assert beside == {"self_attention.linear_proj.weight", "mlp.linear_fc2.weight"}
    architecture = Architecture.from_folder(untied_model)
    mapping = WeightMapping(architecture, 1)
    alone = BucketPlan.derive(
        held(mapping, FolderWeights(untied_model, architecture), 1), mapping, limit=50_000
    )
    beside = {
        e.name.split(".", 3)[-1] for bucket in alone.buckets for e in bucket.entries if not e.lands
    }
    # two, between one another
    assert beside == {"self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"}
    assert plan.peak(0) <= 2 * plan.limit + plan.largest


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_engine_slices_are_the_whole_tensors_cut(ranks: int, untied_model: Path) -> None:
    # 4 heads, 2 KV heads of 16, vocabulary 61, hidden 64, MLP 96
    architecture = Architecture.from_folder(untied_model)
    source = FolderWeights(untied_model, architecture)
    slices = dict(EngineLayout(architecture, ranks).slices(list(source.items())))
    layer = "model.layers.1."
    q, k, v = (source[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv")
    for rank, fused in enumerate(slices[f"{layer}self_attn.qkv_proj.weight"]):
        head = 64 // ranks
        keys = (
            slice(rank * 32 // ranks, (rank + 1) * 32 // ranks)
            if ranks <= 2
            else slice(rank // 2 * 16, rank // 2 * 16 + 16)
        )
        assert torch.equal(fused, torch.cat([q[rank * head : (rank + 1) * head], k[keys], v[keys]]))
    gate, up = (source[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(
        torch.cat([part.chunk(2)[0] for part in slices[f"{layer}mlp.gate_up_proj.weight"]]), gate
    )
    assert torch.equal(
        torch.cat([part.chunk(2)[1] for part in slices[f"{layer}mlp.gate_up_proj.weight"]]), up
    )
    assert torch.equal(
        torch.cat(slices[f"{layer}mlp.down_proj.weight"], 1), source[f"{layer}mlp.down_proj.weight"]
    )
    head = torch.cat(slices["lm_head.weight"])
    assert len(head) == 64
    assert torch.equal(head[:61], source["lm_head.weight"])
    assert not head[61:].any()
    assert all(
        torch.equal(part, source["model.norm.weight"]) for part in slices["model.norm.weight"]
    )


# what SGLang 0.5.23's unpickler takes (srt/utils/common.py, SafeUnpickler), as far as a bucket
# needs it
ALLOWED = {
    ("builtins", "dict"), ("builtins", "list"), ("collections", "OrderedDict"),
    ("types", "SimpleNamespace"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch", "Size"), ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch.storage", "_load_from_bytes"),
}  # fmt: skip


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        assert (module, name) in ALLOWED, f"{module}.{name}"
        return super().find_class(module, name)


def test_a_bucket_passes_the_restricted_unpickler() -> None:
    tensors = [("a", torch.randn(3, 5)), ("b", torch.randn(7).bfloat16())]
    flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in tensors])
    payload, load_format = encode(Parcel(tensors, flat))
    assert load_format == "flattened_bucket"
    found = Unpickler(io.BytesIO(base64.b64decode(payload))).load()
    for described, (name, tensor) in zip(found["metadata"], tensors, strict=True):
        raw = found["flattened_tensor"][described.start_idx : described.end_idx]
        assert described.name == name
        assert torch.equal(raw.clone().view(described.dtype).reshape(described.shape), tensor)


def test_a_bucket_of_tensors_apart_takes_no_more_than_they_are_along() -> None:
    base = torch.zeros(1000, 100)
    payload, load_format = encode(Parcel([("a", base[3:5])], None))
    assert load_format is None
    assert len(payload) < 4000
    ((name, tensor),) = Unpickler(io.BytesIO(base64.b64decode(payload))).load()
    assert (name, tensor.shape) == ("a", (2, 100))


def checksum(tensor: torch.Tensor) -> str:
    """SGLang's, of a parameter in host memory."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def test_a_difference_between_what_was_sent_and_what_is_held_is_named(untied_model: Path) -> None:
    architecture = Architecture.from_folder(untied_model)
    layout = EngineLayout(architecture, 1)
    tensors = list(FolderWeights(untied_model, architecture).items())
    check = ChecksumCheck(layout, torch.float32, "sha256")
    check.add(Parcel(tensors, None))
    held = {name: checksum(parts[0]) for name, parts in layout.slices(tensors)}
    check.compare([held, held])
    with pytest.raises(
        WeightMismatchError, match=r"server 1: model\.norm\.weight is not what was sent"
    ):
        check.compare([held, held | {"model.norm.weight": "0"}])
    with pytest.raises(
        WeightMismatchError, match=r"server 0: was sent model\.norm\.weight, which it does not have"
    ):
        check.compare(
            [{name: value for name, value in held.items() if name != "model.norm.weight"}]
        )
    with pytest.raises(
        WeightMismatchError, match=r"has model\.extra\.weight, which was never sent"
    ):
        check.compare([held | {"model.extra.weight": "0"}])
    names = ChecksumCheck(layout, torch.float32, None)
    names.add(Parcel(tensors, None))
    with pytest.raises(
        WeightMismatchError, match=r"server 1: model\.norm\.weight differs from server 0's"
    ):
        names.compare([held, held | {"model.norm.weight": "0"}])


def fused_experts(
    source: FolderWeights, layer: int, rank: int, ranks: int
) -> dict[str, torch.Tensor]:
    """A layer's experts as SGLang's rank has them on a CPU: 48 columns widened to 64, of which each
    has a part.
    """

    def cut(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[dim] = 64
        wide = torch.zeros(shape)
        wide.narrow(dim, 0, 48).copy_(tensor)
        return wide.narrow(dim, rank * 64 // ranks, 64 // ranks)

    path = f"model.layers.{layer}.mlp.experts."
    matrices = {
        x: [source[f"{path}{e}.{x}_proj.weight"] for e in range(4)] for x in ("gate", "up", "down")
    }
    pairs = zip(matrices["gate"], matrices["up"], strict=True)
    return {
        f"{path}w13_weight": torch.stack(
            [torch.cat([cut(gate, 0), cut(up, 0)]) for gate, up in pairs]
        ),
        f"{path}w2_weight": torch.stack([cut(down, 1) for down in matrices["down"]]),
    }


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family_folder(tmp_path_factory.mktemp("models") / "moe", "qwen3-moe")


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_are_held_to_the_layers_fused_weights_in_whatever_order_they_are_sent(
    ranks: int, moe: Path
) -> None:
    architecture = Architecture.from_folder(moe)
    source, layout = FolderWeights(moe, architecture), EngineLayout(architecture, ranks)
    assert not layout.padded_on_cpu
    tensors = list(source.items())
    held = {}
    for rank in range(ranks):
        fused = {name: parts[rank] for name, parts in layout.slices(tensors)}
        for layer in range(2):
            fused |= fused_experts(source, layer, rank, ranks)
        held |= {
            f"rank{rank}.{name}" if ranks > 1 else name: checksum(part)
            for name, part in fused.items()
        }
    for sent in (tensors, tensors[::-1]):
        check = ChecksumCheck(layout, torch.float32, "sha256")
        for tensor in sent:
            if ".experts." in tensor[0]:
                check.add(Parcel([(tensor[0], scratch := tensor[1].clone())], None))
                scratch.zero_()  # as a bucket's memory is the next one's
        check.add(Parcel([pair for pair in sent if ".experts." not in pair[0]], None))
        check.compare([held])
    wrong = f"{'rank1.' if ranks > 1 else ''}model.layers.1.mlp.experts.w2_weight"
    with pytest.raises(
        WeightMismatchError, match=f"server 0: {wrong} is not what was sent".replace(".", r"\.")
    ):
        check.compare([held | {wrong: "0"}])


@pytest.mark.parametrize("hashing", ["sha256", "fmix32", None])
def test_what_an_engine_of_a_mixture_does_not_know_or_was_not_sent_is_named(
    hashing: Hashing | None, moe: Path
) -> None:
    architecture = Architecture.from_folder(moe)
    source, layout = FolderWeights(moe, architecture), EngineLayout(architecture, 1)
    tensors = list(source.items())
    whole = fmix32 if hashing == "fmix32" else checksum
    held = {name: whole(parts[0]) for name, parts in layout.slices(tensors)}
    held |= {
        name: checksum(part)
        for layer in range(2)
        for name, part in fused_experts(source, layer, 0, 1).items()
    }
    path = "model.layers.0.mlp.experts."

    def check(sent: list[tuple[str, torch.Tensor]], held: dict[str, str] = held) -> None:
        made = ChecksumCheck(layout, torch.float32, hashing)
        made.add(Parcel(sent, None))
        made.compare([held])

    check(tensors)
    if hashing:
        with pytest.raises(
            WeightMismatchError, match=r"model\.norm\.weight is not what was sent: 0"
        ):
            check(tensors, held | {"model.norm.weight": "0"})
    with pytest.raises(
        WeightMismatchError, match=r"was sent model\.layers\.0\.mlp\.experts\.w13_weight, which it"
    ):
        check(tensors, {name: value for name, value in held.items() if name != f"{path}w13_weight"})
    with pytest.raises(
        WeightMismatchError,
        match=r"was sent model\.layers\.0\.mlp\.experts\.4\.gate_proj\.weight, which",
    ):
        check([*tensors, (f"{path}4.gate_proj.weight", source[f"{path}3.gate_proj.weight"])])
    with pytest.raises(
        WeightMismatchError,
        match=r"layers\.0\.mlp\.experts\.w13_weight: part 7 of 8 was never sent",
    ):
        check([(name, tensor) for name, tensor in tensors if name != f"{path}3.up_proj.weight"])
