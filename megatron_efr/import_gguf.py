"""`efr import`: a GGUF file as a Hugging Face model folder, one tensor in memory at a time.

The folder holds config.json, generation_config.json, safetensors, and the tokenizer with its chat
template. Memory: one file of the weights (512 MiB, or one tensor if that is larger) and one tensor,
whatever the size of the model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import torch

from megatron_efr import arguments
from megatron_efr.data.gguf_tokenizer import GGUFTokenizer
from megatron_efr.durable import writing
from megatron_efr.errors import UserError
from megatron_efr.parity import Reference, load, log_probs, random_tokens
from megatron_efr.weights.folder import save_folder
from megatron_efr.weights.gguf_file import GGUFFile
from megatron_efr.weights.gguf_model import EMBEDDING, HEAD, GGUFWeights, read_config

SHARD_BYTES = 2**29  # of the safetensors that are written: one is held in memory
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def import_gguf(source: Path, destination: Path, dtype: str = "float32") -> list[str]:
    """Write the model of a GGUF file as a folder, complete or absent; returns what a person should
    know of it.

    UserError, before anything is written, for what is not read or does not fit together, and for a
    `destination` that is there and is not empty.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(
            f"{destination}: exists already, and is not an empty folder; name another, or remove it"
        )
    file = GGUFFile(source)
    config = read_config(file)
    weights = GGUFWeights(file, config, DTYPES[dtype])
    tokenizer = GGUFTokenizer(file.metadata, str(source))
    if tokenizer.size > config["vocab_size"]:
        raise UserError(
            f"{source}: tokenizer.ggml.tokens has {tokenizer.size:,} tokens, {EMBEDDING} has rows "
            f"for {config['vocab_size']:,}"
        )
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{destination.name}.", dir=destination.parent
        ) as place:
            _write_beside(Path(place), config, tokenizer)
            save_folder(destination, weights.items(), place, shard_bytes=SHARD_BYTES)
    return _notes(file, config)


def verify(source: Path, destination: Path) -> str:
    """A sentence of how far the folder's log-probs are from those of the weights that transformers
    reads of the file.

    These are rounded to the folder's type and put into its model, so float32's rounding alone is
    between the two. If both say a thing of config.json, it must be the same; of rope scaling
    transformers reads nothing. UserError if one is not so. Memory: the weights three times in
    float32.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = load(destination)
    ids = random_tokens(model.config.vocab_size)
    found = log_probs(model, ids)
    theirs: dict[str, Any] = load_gguf_checkpoint(
        str(source), return_tensors=True, model_to_load=model
    )
    ours = json.loads((destination / "config.json").read_text(encoding="utf-8"))
    for key in sorted(ours.keys() & theirs["config"].keys() - {"architectures", "eos_token_id"}):
        mine, other = ours[key], theirs["config"][key]
        if not _alike(mine, other):
            raise UserError(
                f"{destination / 'config.json'}: {key} is {mine!r}, and transformers reads "
                f"{other!r}"
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in theirs["tensors"]:
                raise UserError(f"{source}: transformers reads no {name}")
            parameter.copy_(theirs["tensors"].pop(name).to(DTYPES[ours["dtype"]]))
    return Reference.of(model, ids).compare(found, str(destination))


def _alike(ours: Any, theirs: Any) -> bool:
    """The same value; of numbers that are not whole, the same float32."""
    return (
        torch.tensor(ours).equal(torch.tensor(theirs))
        if isinstance(ours, float)
        else ours == theirs
    )


def _write_beside(place: Path, config: dict[str, Any], tokenizer: GGUFTokenizer) -> None:
    """Everything but the weights."""
    ids = tokenizer.ids()
    end = ids["eos_token_id"]
    named = {key: value for key, value in ids.items() if key == "bos_token_id"}
    named["eos_token_id"] = end[0] if isinstance(end, list) else end
    for name, content in {"config.json": config | named, "generation_config.json": ids}.items():
        (place / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.build(config["max_position_embeddings"]).save_pretrained(str(place))


def _notes(file: GGUFFile, config: dict[str, Any]) -> list[str]:
    kinds: dict[str, int] = {}
    for stored in file.tensors.values():
        kinds[stored.kind] = kinds.get(stored.kind, 0) + 1
    notes = [
        f"{len(file.tensors)} tensors: "
        f"{', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}"
    ]
    if config["tie_word_embeddings"]:
        notes.append(f"tied: the file has no {HEAD}, so the head is the embedding")
    else:
        notes.append(
            f"not tied: the file has {HEAD} ({file.tensors[HEAD].kind}) beside {EMBEDDING} "
            f"({file.tensors[EMBEDDING].kind}); of a model that was tied, llama.cpp may have "
            "quantised both"
        )
    if "tokenizer.chat_template" not in file.metadata:
        notes.append(
            "no chat template: the file has none; put a chat_template.jinja into the folder"
        )
    return notes


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="efr import", description=str(__doc__).partition(": ")[2])
    made.add_argument(
        "source", type=Path, metavar="SRC", help="a GGUF file of a Llama, Qwen 2 or Qwen 3"
    )
    made.add_argument("destination", type=Path, metavar="DST", help="the model folder to write")
    made.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights that are written; float32, the default, is exactly what the file says",
    )
    made.add_argument(
        "--verify",
        action="store_true",
        help="also compare log-probs with the weights that transformers reads",
    )
    return made


def main(argv: SequenceOf[str] | None = None) -> None:
    """Command line of `efr import`."""
    given = _parser().parse_args(argv)
    began = time.perf_counter()
    for note in import_gguf(given.source, given.destination, given.dtype):
        print(note)
    print(f"{given.destination}: written in {time.perf_counter() - began:.1f} s", flush=True)
    if given.verify:
        print(verify(given.source, given.destination), flush=True)


if __name__ == "__main__":
    arguments.run(main)
