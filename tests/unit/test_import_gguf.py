"""Import of GGUF files: types by their definitions, models to the bit, tokenizers as their makers
have them.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_efr import convert, import_gguf
from megatron_efr.errors import UserError
from megatron_efr.weights.folder import FolderWeights
from megatron_efr.weights.gguf_file import KINDS, GGUFFile
from tests.families import make_family_folder
from tests.gguf_files import ROWS, gguf, write_model

pytestmark = pytest.mark.alike


# -- types of tensors, by the block layouts in ggml's ggml-common.h and ggml-quants.c
# ----------------------------------


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block, np.float16, 1, at)[0])


def nibbles(block: bytes) -> list[int]:
    return [byte & 15 for byte in block] + [byte >> 4 for byte in block]


def fifth_bits(block: bytes) -> list[int]:
    bits = struct.unpack("<I", block)[0]
    return [(bits >> i & 1) << 4 for i in range(32)]


def k_scales(packed: bytes) -> list[tuple[int, int]]:
    """Eight scales and minima of 6 bits each: ggml's get_scale_min_k4."""
    first = [(packed[j] & 63, packed[j + 4] & 63) for j in range(4)]
    return first + [
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
        for j in range(4, 8)
    ]


def k_block(block: bytes, high: bytes | None, low: bytes) -> list[float]:
    """A block of Q4_K or Q5_K: 8 parts of 32, two of them in each 32 bytes."""
    found = []
    for part, (scale, least) in enumerate(k_scales(block[4:16])):
        for i in range(32):
            q = low[part // 2 * 32 + i] >> part % 2 * 4 & 15
            q |= 0 if high is None else (high[i] >> part & 1) << 4
            found.append(half(block, 0) * scale * q - half(block, 2) * least)
    return found


def q6_block(block: bytes) -> list[float]:
    found = [0.0] * 256
    for i in range(256):
        side, quarter, at = i // 128, i % 128 // 32, i % 32
        low = block[side * 64 + quarter % 2 * 32 + at] >> quarter // 2 * 4 & 15
        q = (low | (block[128 + side * 32 + at] >> quarter * 2 & 3) << 4) - 32
        scale = struct.unpack("b", block[192 + i // 16 : 193 + i // 16])[0]
        found[i] = half(block, 208) * scale * q
    return found


def by_definition(kind: str, b: bytes) -> list[float]:
    if kind == "F32":
        return list(struct.unpack("<f", b))
    if kind == "F16":
        return [half(b, 0)]
    if kind == "BF16":
        return list(struct.unpack("<f", b"\0\0" + b))
    if kind == "Q8_0":
        return [half(b, 0) * q for q in struct.unpack("32b", b[2:])]
    if kind == "Q4_0":
        return [half(b, 0) * (q - 8) for q in nibbles(b[2:])]
    if kind == "Q4_1":
        return [half(b, 0) * q + half(b, 2) for q in nibbles(b[4:])]
    if kind == "Q5_0":
        return [
            half(b, 0) * ((q | h) - 16)
            for q, h in zip(nibbles(b[6:]), fifth_bits(b[2:6]), strict=True)
        ]
    if kind == "Q5_1":
        return [
            half(b, 0) * (q | h) + half(b, 2)
            for q, h in zip(nibbles(b[8:]), fifth_bits(b[4:8]), strict=True)
        ]
    if kind == "Q4_K":
        return k_block(b, None, b[16:])
    return k_block(b, b[16:48], b[48:]) if kind == "Q5_K" else q6_block(b)


def random_blocks(kind: str, count: int) -> np.ndarray:
    """Blocks of random bytes, their half-precision scales being numbers of weights' size: uint8
    [count, bytes].
    """
    rng = np.random.default_rng(0)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    if kind in ("F32", "F16", "BF16"):
        numbers = rng.normal(size=count).astype(np.float16 if kind == "F16" else np.float32)
        return np.ascontiguousarray(numbers.view(np.uint8).reshape(count, -1)[:, -size:])
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    places = {"Q6_K": [208]}.get(kind, [0, 2] if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0])
    for at in places:
        blocks[:, at : at + 2] = (
            rng.normal(scale=0.1, size=(count, 1)).astype(np.float16).view(np.uint8)
        )
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_each_type_is_read_by_its_definition(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = gguf.GGMLQuantizationType[kind]
    length = gguf.GGML_QUANT_SIZES[number][0]
    rows, across = 5, 2 if length > 1 else 64
    blocks = random_blocks(kind, rows * across)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("before.weight", np.ones(3, np.float32))
    raw = blocks.reshape(rows, -1)
    floats = {"F32": np.float32, "F16": np.float16}
    if kind in floats:
        writer.add_tensor("one.weight", raw.view(floats[kind]))
    else:
        writer.add_tensor("one.weight", raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # two rows at once, then one
    monkeypatch.setattr("megatron_efr.weights.gguf_file._CHUNK", 2 * across * length)
    found = GGUFFile(tmp_path / "x.gguf").tensor("one.weight", torch.float32)
    wanted = torch.tensor(
        [by_definition(kind, block.tobytes()) for block in blocks], dtype=torch.float64
    )
    assert found.shape == (rows, across * length)
    torch.testing.assert_close(found.double(), wanted.view(rows, -1), rtol=1e-6, atol=1e-7)


# -- models
# --------------------------------------------------------------------------------------------------


def small(folder: Path, family: str, **changes: Any) -> Path:
    return make_family_folder(
        folder, family, **{"vocab_size": ROWS, "tie_word_embeddings": False} | changes
    )


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            torch.arange(40)[None]
        ).logits


@pytest.mark.parametrize(
    "family", ["llama", "llama3", "llama-linear", "qwen2", "qwen2-yarn", "qwen3", "qwen3-yarn"]
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_to_the_bit(family: str, tied: bool, tmp_path: Path) -> None:
    """Through float32; rope scaling included, which transformers' own loading drops."""
    changes: dict[str, Any] = {"tie_word_embeddings": tied}
    if family == "qwen3-yarn":  # the package's family has fields that GGUF has no keys for
        rope = {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e6,
        }
        family, changes = "qwen3", changes | {"rope_parameters": rope}
    folder = small(tmp_path / "model", family, **changes)
    import_gguf.import_gguf(write_model(tmp_path / "x.gguf", folder), tmp_path / "out")
    here, there = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (folder, tmp_path / "out")
    )
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert torch.equal(logits(folder), logits(tmp_path / "out"))


def test_quantised_rows_are_turned_back_whole(tmp_path: Path) -> None:
    folder = small(tmp_path / "model", "llama")
    file = write_model(
        tmp_path / "x.gguf", folder, {"attn_q.weight": "Q4_0", "ffn_down.weight": "Q8_0"}
    )
    import_gguf.import_gguf(file, tmp_path / "out", "bfloat16")
    here, there = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (folder, tmp_path / "out")
    )
    assert {tensor.dtype for tensor in there.values()} == {torch.bfloat16}
    # half a step of 16, of 255, and bfloat16's below
    parts = {"q_proj.weight": 14, "down_proj.weight": 240}
    for name, wanted in here.items():
        part = parts.get(".".join(name.split(".")[-2:]), 256)
        assert (there[name].float() - wanted).abs().max() <= wanted.abs().max() * (
            1 / part + 1 / 256
        ), name


def test_the_folder_is_one_of_ours_and_saves_again(tmp_path: Path) -> None:
    folder = small(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    notes = import_gguf.import_gguf(write_model(tmp_path / "x.gguf", folder), tmp_path / "out")
    assert notes == [
        "26 tensors: 26 F32",
        "tied: the file has no output.weight, so the head is the embedding",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "x.gguf"]
    convert.hf_to_megatron(tmp_path / "out", tmp_path / "megatron")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(folder))
    weights = FolderWeights(tmp_path / "out", convert.Architecture.from_folder(tmp_path / "out"))
    assert weights.dtype("model.norm.weight") == torch.float32


@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_verification_against_what_transformers_reads(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_model(
        tmp_path / "x.gguf", small(tmp_path / "model", family), {"attn_q.weight": "Q4_0"}
    )
    import_gguf.main([str(file), str(tmp_path / "out"), "--verify", "--dtype", "bfloat16"])
    assert "log-probs of random tokens are " in capsys.readouterr().out
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors[
        "model.layers.0.self_attn.k_proj.weight"
    ].flip(0)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="out: log-probs of random tokens are"):
        import_gguf.verify(file, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 2e-06'))
    with pytest.raises(
        UserError, match=r"config\.json: rms_norm_eps is 2e-06, and transformers reads 9\.99"
    ):
        import_gguf.verify(file, tmp_path / "out")


def test_a_head_of_its_own_is_stated(tmp_path: Path) -> None:
    folder = small(tmp_path / "model", "qwen2")
    file = write_model(tmp_path / "x.gguf", folder, {"token_embd.weight": "Q8_0"})
    assert import_gguf.import_gguf(file, tmp_path / "out")[1] == (
        "not tied: the file has output.weight (F32) beside token_embd.weight (Q8_0); of a model "
        "that was tied, llama.cpp may have quantised both"
    )
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )


# -- the header, and refusals
# ------------------------------------------------------------------------------------------


def test_the_header_is_what_the_package_reads(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "x.gguf", small(tmp_path / "model", "qwen3"), {"ffn_up.weight": "Q8_0"}
    )
    reader, file = gguf.GGUFReader(path), GGUFFile(path)
    read = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert read.keys() == file.metadata.keys()
    assert all(
        np.float32(value) == np.float32(file.metadata[key])
        for key, value in read.items()
        if type(value) is float
    )
    assert all(
        value == file.metadata[key] for key, value in read.items() if type(value) is not float
    )
    stored = {
        t.name: (t.tensor_type.name, tuple(t.shape[::-1]), t.data_offset, t.n_bytes)
        for t in reader.tensors
    }
    assert stored == {
        name: (found.kind, found.shape, found.start, found.rows * found.row_bytes)
        for name, found in file.tensors.items()
    }


NORM, FACTORS = "output_norm.weight", "rope_freqs.weight"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"metadata": {"general.architecture": "gemma3"}},
            "general.architecture 'gemma3' is not supported; supported",
        ),
        ({"metadata": {"llama.block_count": None}}, "the metadata lacks llama.block_count"),
        (
            {"metadata": {"llama.block_count": 3}},
            "the tensors are not those of a llama model of its metadata; missing blk.2",
        ),
        (
            {"metadata": {"llama.expert_count": 8}},
            "llama.expert_count: 8 is not supported; supported: 0",
        ),
        ({"metadata": {"llama.logit_scale": 2.0}}, "llama.logit_scale: 2.0 is not known"),
        (
            {"metadata": {"llama.rope.scaling.type": "longrope"}},
            "llama.rope.scaling.type: 'longrope' is not supported",
        ),
        (
            {"metadata": {"llama.feed_forward_length": 32}},
            "blk.0.ffn_gate.weight is [96, 64], the metadata make it [32",
        ),
        (
            {"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}},
            "missing none, unexpected blk.0.attn_q.bias",
        ),
        ({"tensors": {NORM: None}}, "missing output_norm.weight, unexpected none"),
        (
            {"tensors": {NORM: np.full(64, np.inf, np.float32)}},
            "output_norm.weight holds numbers that are not finite",
        ),
        (
            {"tensors": {FACTORS: np.linspace(1, 8, 8, dtype=np.float32)}},
            "rope_freqs.weight holds other numbers than",
        ),
        (
            {"kinds": {"0.ffn_up.weight": "TQ2_0"}},
            "blk.0.ffn_up.weight is quantised as TQ2_0; supported: F32, F16, BF16",
        ),
        (
            {"tokenizer": {"pre": "viking"}},
            "tokenizer.ggml.pre 'viking' is a way to cut text that is not known",
        ),
        (
            {"tokenizer": {"model": "llama"}},
            "tokenizer.ggml.model 'llama' is not supported; supported: 'gpt2'",
        ),
        ({"tokenizer": {"merges": None}}, "the metadata lacks tokenizer.ggml.merges"),
        (
            {"tokenizer": {"merges": ["qq q"]}},
            "tokenizer.ggml.merges do not belong to tokenizer.ggml.tokens",
        ),
        (
            {"tokenizer": {"eos_token_id": 999}},
            "tokenizer.ggml.eos_token_id 999 is none of the 288 tokens",
        ),
    ],
)
def test_what_cannot_be_imported_is_named(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = small(
        tmp_path / "model", "llama", **({"hidden_size": 256} if "kinds" in changes else {})
    )
    path = write_model(tmp_path / "x.gguf", folder, **changes)
    with pytest.raises(UserError, match=rf"x\.gguf.*{re.escape(said)}"):
        import_gguf.import_gguf(path, tmp_path / "out")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["model", "x.gguf"]


def test_a_file_that_is_cut_off_says_where(tmp_path: Path) -> None:
    path = write_model(tmp_path / "x.gguf", small(tmp_path / "model", "qwen2"))
    whole, header = (
        path.read_bytes(),
        min(stored.start for stored in GGUFFile(path).tensors.values()),
    )
    cuts = {
        3: "it ends within its first bytes",
        len(whole) - 40: r"ends at byte [\d,]+, and it has [\d,]+; fetch it again",
        header // 2: r"it ends within tokenizer\.ggml\.",
        header - 60: r"it ends within (the table of tensors|blk|output|token)",
    }
    for length, said in cuts.items():
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"x\.gguf: the file is cut off: .*{said}"):
            import_gguf.import_gguf(path, tmp_path / "out")
    path.write_bytes(b"PK\3\4" + whole[4:])
    with pytest.raises(UserError, match="not a GGUF file"):
        import_gguf.import_gguf(path, tmp_path / "out")
    path.write_bytes(whole.replace(struct.pack("<I", 3), struct.pack("<I", 1), 1))
    with pytest.raises(UserError, match="GGUF of version 1; supported: 2 and 3"):
        import_gguf.import_gguf(path, tmp_path / "out")
    with pytest.raises(UserError, match=r"none\.gguf: cannot be read: No such file"):
        import_gguf.import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = write_model(tmp_path / "x.gguf", small(tmp_path / "model", "qwen2"))
    import_gguf.main([str(path), str(tmp_path / "out")])
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(UserError, match="out: exists already, and is not an empty folder"):
        import_gguf.main([str(path), str(tmp_path / "out")])
    assert (tmp_path / "out" / "config.json").read_bytes() == before


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_efr.weights import gguf_file

    monkeypatch.setattr(gguf_file.importlib, "import_module", _absent)
    gguf_file.package.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'megatron-efr\[gguf\]'"):
        GGUFFile(tmp_path / "x.gguf")


def _absent(name: str) -> None:
    raise ImportError(name)
