"""A stream of named tensors, held to the model's names and shapes as it passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch


def check_names(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass (Hugging Face name, whole tensor) pairs on; `shapes` has the model's
    (`WeightMapping.shapes`).

    ValueError names a tensor that is unknown, given twice or mis-shaped, before it is passed on,
    and at the end those that are missing.
    """
    missing = dict.fromkeys(shapes)
    for name, tensor in weights:
        if name not in shapes:
            raise ValueError(f"{name}: no such tensor in this model")
        if name not in missing:
            raise ValueError(f"{name}: published twice")
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name}: shape {list(tensor.shape)}; this model has {list(shapes[name])}"
            )
        del missing[name]
        yield name, tensor
    if missing:
        names = list(missing)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"missing from the published weights: {', '.join(names[:3])}{more}")
