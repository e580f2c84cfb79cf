"""`efr inspect`: what is in a checkpoint: its step, its tensors, their sizes, and whether it
verifies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence as SequenceOf
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_efr import arguments
from megatron_efr.checkpoint.manifest import STATE, CheckpointError, entries, read_state, verify
from megatron_efr.checkpoint.torch_dist import COMMON_FILE, read_metadata
from megatron_efr.weights.lora import shape_of_adapters


def describe(checkpoint: Path) -> list[str]:
    """Describe a checkpoint, line by line, without reading a tensor."""
    lines = []
    # a converted checkpoint belongs to no run, and has no state of one
    if (checkpoint / STATE).is_file():
        state = read_state(checkpoint)
        start = state["initial_model"]
        lines.append(
            f"step {state['step']}, from {start['path']} (SHA-256 {start['sha256'][:12]}...)"
        )
    # every tensor by its metadata, and the optimizer's bytes apart from the model's
    stored = read_metadata(checkpoint).state_dict_metadata
    tensors = {
        key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)
    }
    width = max((len(key) for key in tensors), default=0)
    sizes = {"model": 0, "optimizer": 0}
    for key, tensor in sorted(tensors.items()):
        bytes_ = tensor.size.numel() * tensor.properties.dtype.itemsize
        sizes["optimizer" if key.startswith("optimizer.") else "model"] += bytes_
        kind = str(tensor.properties.dtype).removeprefix("torch.")
        lines.append(
            f"  {key:{width}}  {kind:8}  {list(tensor.size)}  {_size(bytes_)}, "
            f"{len(tensor.chunks)} chunks"
        )
    # adapters show by names and shapes alone
    if found := shape_of_adapters({key: tuple(tensor.size) for key, tensor in tensors.items()}):
        lines.append(
            f"low-rank adapters of rank {found[0]} beside {', '.join(found[1])}; converted, they "
            "are merged"
        )
    # as it weighs on disk, beside what it holds
    files = {path.name: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    lines.append(
        f"{len(tensors)} tensors: model {_size(sizes['model'])}, optimizer "
        f"{_size(sizes['optimizer'])}; {len(files)} files, {_size(sum(files.values()))}"
    )
    # 0.19 keeps the common state among the tensors, and reads the older file too
    since = "0.16" if (checkpoint / COMMON_FILE).is_file() else "0.19"
    lines.append(
        f"a run goes on from it under Megatron-Core {since} or later; its weights need none"
    )
    return lines


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"


def main(argv: SequenceOf[str] | None = None) -> None:
    """Command line of `efr inspect`; a checkpoint that does not verify is an error, after what
    there is of it.
    """
    parser = argparse.ArgumentParser(
        prog="efr inspect", description=str(__doc__).partition(": ")[2]
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a folder like runs/x/checkpoints/step_000010"
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not read the files to compare their checksums",
    )
    given = parser.parse_args(argv)
    print("\n".join(describe(given.checkpoint)))
    if given.no_verify:
        return
    try:
        verify(given.checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"does not verify: {error}") from error
    print(f"verified: {len(entries(given.checkpoint))} files are what was written")


if __name__ == "__main__":
    arguments.run(main)
