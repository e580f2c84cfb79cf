"""Checks that a running SGLang server is what the configuration says, by the arguments that it was
started with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_efr.rollout.sglang.penalty import SERVER
from megatron_efr.types import UserError

_DTYPES = {"float": "float32", "half": "float16"}  # SGLang's other names


def check_server(
    url: str,
    info: Mapping[str, Any],
    *,
    ranks: int,
    dtype: str,
    routed_experts: bool,
    penalties: bool = False,
) -> None:
    """UserError says in what the server at `url` differs from a run's; `info` is what /server_info
    answers.

    `ranks`: its tensor-parallel ranks. `dtype`: the policy's. `routed_experts`: responses must say
    which they had. `penalties`: it must take a penalty on tokens, as no server of a training run
    may.
    """
    # the split that tensors are sent for
    if info["tp_size"] != ranks:
        raise UserError(f"rollout.tp: {ranks}, but {url} has --tp-size {info['tp_size']}")
    # precision: engine and policy must agree on log-probs
    served = _DTYPES.get(info["dtype"], info["dtype"])
    if served != dtype:  # auto serves a float32 model in half precision
        raise UserError(
            f"rollout.urls: {url} runs with --dtype {served}, and model.dtype is {dtype}, so "
            f"their log-probs would differ by several 1e-2; start it with --dtype {dtype}"
        )
    if served != "float32" and not info["enable_fp32_lm_head"]:
        raise UserError(
            f"rollout.urls: {url} computes logits in {served} and the policy in float32, so their "
            "log-probs would differ by several 1e-2; start it with --enable-fp32-lm-head"
        )
    # what methods and scripts need, which is off by default
    if routed_experts and not info["enable_return_routed_experts"]:
        raise UserError(
            f"model.routing: replay needs the experts that engines choose, and {url} was started "
            "without --enable-return-routed-experts"
        )
    if penalties and (missing := [name for name in SERVER if not info[name]]):
        flag = "--" + missing[0].replace("_", "-")
        raise UserError(
            f"evaluation.script: it penalises tokens, and {url} was started without {flag}"
        )
    # what would change the sampler's log-probs behind the run's back
    if (info["enable_custom_logit_processor"] and not penalties) or info[
        "preferred_sampling_params"
    ]:
        raise UserError(
            f"rollout.urls: {url} runs with --enable-custom-logit-processor or "
            "--preferred-sampling-params; its log-probs would not be the sampler's"
        )
