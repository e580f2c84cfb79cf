"""A penalty on tokens within SGLang's servers: a custom logit processor, which they are sent as
source.
"""

from __future__ import annotations

import inspect
import json
import pickle
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_efr.rollout.driver import TokenPenalty
from megatron_efr.types import Sampling

SERVER = {"enable_custom_logit_processor": True, "disable_overlap_schedule": True}
"""The arguments of servers that take one. Overlapped, a processor would not see the newest
token.
"""


@dataclass(frozen=True, slots=True)
class PenalisedSampling(Sampling):
    """A draw with a penalty, in a response that begins behind `begun` of the tokens it goes on
    from.
    """

    penalty: TokenPenalty
    begun: int

    def parameters(self) -> dict[str, Any]:
        """SGLang's `custom_params`, of which `SwitchPenalty` is told."""
        return {**self.penalty._asdict(), "tokens": list(self.penalty.tokens), "begun": self.begun}


class SwitchPenalty:
    """`TokenPenalty` for a batch within a server, which knows this class by its source alone."""

    def __call__(self, logits, custom_param_list):
        for row, given in enumerate(custom_param_list):
            request, window, tokens = given["__req__"], given["window"], given["tokens"]
            said = [
                *request.origin_input_ids[given["begun"] :][-window:],
                *request.output_ids[-window:],
            ]
            if len(said) < window or not set(tokens).isdisjoint(said[len(said) - window + 1 :]):
                logits[row, tokens] -= given["amount"]
        return logits


class _AsSource:
    """Is pickled as a call that makes `SwitchPenalty` of its source.

    dill would pickle its bytecode, which ties the server's Python to ours.
    """

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        source = inspect.getsource(SwitchPenalty)
        return eval, (f"(lambda space: exec({source!r}, space) or space['SwitchPenalty'])({{}})",)


@cache
def processor() -> str:
    """Name of the processor in a request, as SGLang's `CustomLogitProcessor.to_str` has it."""
    return json.dumps({"callable": pickle.dumps(_AsSource()).hex()})
