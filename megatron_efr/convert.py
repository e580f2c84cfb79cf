"""`efr convert`: between Hugging Face model folders and Megatron checkpoints, one tensor in memory
at a time.

A Megatron checkpoint loads under any layout, so there is no flag for one. Converting takes one
process, no GPU, and neither Megatron nor Triton; comparing log-probs (`--verify`) builds both
models, one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch

from megatron_efr import arguments
from megatron_efr.checkpoint import torch_dist
from megatron_efr.checkpoint.manifest import STATE, verify, write_manifest
from megatron_efr.checkpoint.model_source import HUGGING_FACE, find_checkpoint, find_template
from megatron_efr.durable import replace_file, whole_folder
from megatron_efr.errors import UserError
from megatron_efr.parity import Reference, load, random_tokens
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import (
    FolderWeights,
    copy_all_but_weights,
    fingerprint,
    save_folder,
)
from megatron_efr.weights.lora import save_adapter

SHARD_BYTES = 2**29  # of the safetensors that are written: one is held in memory


def hf_to_megatron(source: Path, destination: Path) -> None:
    """Write a Hugging Face folder as the Megatron checkpoint of step 0, complete or absent.

    Beside the weights it holds what a run's checkpoint holds, manifest included, and the folder's
    other files.
    """
    _refuse_existing(destination)
    architecture = Architecture.from_folder(source)
    weights = FolderWeights(source, architecture)
    with whole_folder(destination) as partial:
        (partial / HUGGING_FACE).mkdir()
        torch_dist.write(partial, weights, architecture)
        copy_all_but_weights(source, partial / HUGGING_FACE)
        state = {"step": 0, "initial_model": {"path": str(source), "sha256": fingerprint(source)}}
        replace_file(partial / STATE, json.dumps(state, indent=1))
        write_manifest(partial)


def megatron_to_hf(source: Path, destination: Path, template: Path | None = None) -> None:
    """Write a Megatron checkpoint, a run's (or its newest) or a converted one, as a whole Hugging
    Face folder or none.

    Configuration and tokenizer come from `template`, by default the model that the checkpoint was
    made from.
    """
    _refuse_existing(destination)
    source = find_checkpoint(source) or source
    verify(source)
    template = template or find_template(source)
    weights = torch_dist.CheckpointWeights(source, Architecture.from_folder(template))
    save_folder(destination, weights.items(), template, shard_bytes=SHARD_BYTES)


def megatron_to_peft(source: Path, destination: Path, template: Path | None = None) -> None:
    """Write the low-rank adapters of a Megatron checkpoint as a PEFT folder; UserError if it has
    none.
    """
    _refuse_existing(destination)
    source = find_checkpoint(source) or source
    verify(source)
    template = template or find_template(source)
    weights = torch_dist.CheckpointWeights(source, Architecture.from_folder(template))
    if weights.lora is None:
        raise UserError(
            f"{source}: holds no low-rank adapters (model.lora); its weights: efr convert "
            "megatron-to-hf"
        )
    save_adapter(destination, weights.adapters(), weights.lora, template)


def compare_bytes(folder: Path, checkpoint: Path) -> str:
    """A sentence of what was compared, byte by byte; UserError names the first tensor that differs.

    Every tensor is converted both ways. A checkpoint with low-rank adapters goes one way, since no
    file holds merged weights but the folder: they are merged anew. Memory: one tensor at a time.
    """
    architecture = Architecture.from_folder(folder)
    there = FolderWeights(folder, architecture)
    here = torch_dist.CheckpointWeights(checkpoint, architecture)
    if here.lora is not None:
        for name, tensor in here.items():
            if not _same_bytes(tensor, there[name]):
                raise UserError(
                    f"{folder}: {name} is not what {checkpoint} holds, with its adapter"
                )
        return f"{len(there.shapes)} tensors merged anew: every byte is the same"
    mapping = here.mapping
    for name in mapping.parameters():
        parameter = here.parameter(name)
        sources = {source: there[source] for source in mapping.sources(name)}
        # the checkpoint's without the padding
        forth = mapping.to_megatron(name, sources, 0)[: len(parameter)]
        if not _same_bytes(forth, parameter):
            raise UserError(
                f"{checkpoint}: {name} is not what {folder} holds in {', '.join(sources)}"
            )
        for source, tensor in mapping.to_hugging_face(name, [parameter]):
            if not _same_bytes(tensor, sources[source]):
                raise UserError(f"{folder}: {source} is not what {checkpoint} holds in {name}")
    return f"{len(there.shapes)} tensors converted both ways: every byte is the same"


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def compare_logits(folder: Path, checkpoint: Path) -> str:
    """A sentence of how far Megatron's float32 log-probs are from transformers' float64; UserError
    if that is too far.

    transformers reads the folder; Megatron reads the checkpoint, through its own loader. One model
    is in memory at a time, in float32.
    """
    from megatron_efr.config import ParallelConfig
    from megatron_efr.policy import join_ranks
    from megatron_efr.policy.forward import checkpoint_log_probs

    architecture = Architecture.from_folder(folder)
    ids = random_tokens(architecture.vocab)
    reference = Reference.of(load(folder), ids)
    lora = torch_dist.CheckpointWeights(checkpoint, architecture).lora
    with join_ranks(ParallelConfig(), seed=0) as ranks:
        found = checkpoint_log_probs(architecture, checkpoint, ids, ranks, lora)
    return reference.compare(found, f"{checkpoint}, beside {folder}")


def _refuse_existing(destination: Path) -> None:
    if destination.exists():
        raise UserError(f"{destination}: exists already; name another, or remove it")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="efr convert", description=str(__doc__).partition(": ")[2])
    directions = made.add_subparsers(dest="direction", required=True)
    # a command for each direction: its help lists what it takes, and no more
    for name, text in {
        "hf-to-megatron": "a Hugging Face folder to a Megatron checkpoint",
        "megatron-to-hf": (
            "a Megatron checkpoint (a run's, or a converted one) to a Hugging Face folder"
        ),
        "megatron-to-peft": (
            "the low-rank adapters of a Megatron checkpoint to a folder that PEFT loads"
        ),
    }.items():
        direction = directions.add_parser(name, help=text, description=text)
        direction.add_argument("source", type=Path, metavar="SRC")
        direction.add_argument("destination", type=Path, metavar="DST")
        if name != "megatron-to-peft":
            # adapters alone are no model that could be converted back
            direction.add_argument(
                "--verify-bytes",
                action="store_true",
                help="convert back, or merge low-rank adapters anew, and compare every byte",
            )
            direction.add_argument(
                "--verify",
                action="store_true",
                help="also compare log-probs with transformers; builds both models in turn",
            )
        else:
            direction.set_defaults(verify_bytes=False, verify=False)
        if name != "hf-to-megatron":
            # a checkpoint holds weights alone; the rest of a model folder comes from here
            direction.add_argument(
                "--template",
                type=Path,
                metavar="HF_FOLDER",
                help="configuration and tokenizer, if not the start's",
            )
    return made


def main(argv: SequenceOf[str] | None = None) -> None:
    """Command line of `efr convert`."""
    given = _parser().parse_args(argv)
    began = time.perf_counter()
    forth = given.direction == "hf-to-megatron"
    if forth:
        folder, checkpoint = given.source, given.destination
    else:  # of a run its newest: the one that is written is the one that is verified
        folder = given.destination
        checkpoint = find_checkpoint(given.source) or given.source
    if given.verify and not forth:
        # Megatron's own loader will be asked
        from megatron_efr.checkpoint.shards import check_readable

        check_readable(checkpoint)
    # convert, one way or the other
    try:
        if forth:
            hf_to_megatron(folder, checkpoint)
        elif given.direction == "megatron-to-hf":
            megatron_to_hf(checkpoint, folder, given.template)
        else:
            megatron_to_peft(checkpoint, folder, given.template)
    except OSError as error:
        raise UserError(
            f"{given.source} to {given.destination}: cannot be read or written: {error}"
        ) from error
    print(f"{given.destination}: written in {time.perf_counter() - began:.1f} s")
    # compare what was written with what was read
    if given.verify or given.verify_bytes:
        print(compare_bytes(folder, checkpoint))
    if given.verify:
        print(f"Megatron's {compare_logits(folder, checkpoint)}")
    sys.stdout.flush()


if __name__ == "__main__":
    arguments.run(main)
