"""Checks that two computations of log-probs agree as closely as float32 can: both against
transformers' float64.

How far float32 is from float64 grows with the model (2.8e-5 at 135M parameters, 3.2e-4 at 0.5B), so
no fixed number tells a wrong model from a rounded one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_efr.errors import UserError

FACTOR = 4.0  # another order of sums may round so much worse than transformers' own
FLOOR = 1e-5  # of the largest difference; a tenth of it of the mean


def random_tokens(vocab: int, rows: int = 4, length: int = 48) -> list[list[int]]:
    """The same token ids every time."""
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()


def load(folder: Path) -> Any:
    """transformers' model of a folder, in float32; experts without grouped products, which know no
    float64.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )


@torch.no_grad()
def log_probs(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """Log-probs float64 [rows, length - 1] of each row's tokens but the first, as transformers
    computes them.
    """
    found = []
    for row in ids:  # the logits of one at a time
        logits = model(torch.tensor([row]), use_cache=False).logits[0, :-1]
        found.append(
            torch.log_softmax(logits, -1).gather(1, torch.tensor(row[1:])[:, None])[:, 0].double()
        )
    return torch.stack(found)


def exact_log_probs(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """Like `log_probs` of a float32 model, in float64; one layer at a time is held so. Its norms
    stay in float32.
    """
    with _in_float64(model):
        return log_probs(model, ids)


@contextmanager
def _in_float64(model: Any) -> Iterator[None]:
    # what a file on disk may still hold is not copied
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            kept[parameter] = parameter.data
            parameter.data = parameter.data.double()

    def narrow(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters():
            parameter.data = kept.pop(parameter)

    handles = [
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.double())
    ]
    for part in (*model.base_model.layers, model.base_model.norm, model.get_output_embeddings()):
        handles += [part.register_forward_pre_hook(widen), part.register_forward_hook(narrow)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Reference:
    """Log-probs of some tokens in float64, and how far transformers' own float32 is from it."""

    exact: torch.Tensor
    worst: float
    mean: float

    @classmethod
    def of(cls, model: Any, ids: list[list[int]]) -> Reference:
        """The reference of a transformers model in float32."""
        exact = exact_log_probs(model, ids)
        off = (log_probs(model, ids) - exact).abs()
        return cls(exact, float(off.max()), float(off.mean()))

    def compare(self, found: torch.Tensor, what: str) -> str:
        """A sentence of how far `found` is from float64; UserError if float32's rounding does not
        explain it.
        """
        off = (found.double() - self.exact).abs()
        worst, mean = float(off.max()), float(off.mean())
        most, most_mean = max(FLOOR, FACTOR * self.worst), max(FLOOR / 10, FACTOR * self.mean)
        figures = (
            f"log-probs of random tokens are {worst:.1e} at most, {mean:.1e} in the mean from "
            "float64's"
        )
        own = f"transformers' float32 is {self.worst:.1e} and {self.mean:.1e} from them"
        if not (worst <= most and mean <= most_mean):
            raise UserError(
                f"{what}: {figures}; {own}, and {most:.1e} and {most_mean:.1e} are allowed"
            )
        return f"{figures} ({own})"
