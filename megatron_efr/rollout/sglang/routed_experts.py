"""The experts that an SGLang server chose for each token, from its answer to an array."""

from __future__ import annotations

import base64
import binascii

import numpy as np

from megatron_efr.weights.architecture import Architecture


def decode_routing(encoded: str, tokens: int, architecture: Architecture) -> np.ndarray:
    """`routed_experts` of a `Response` from meta_info's: [tokens, layers, experts per token] as
    base64 of int32.

    `tokens` are those that were read: prompt and response but for its last token. Kept in the
    narrowest signed type, a byte up to 128 experts. ValueError if this is not the model's routing.
    """
    experts = architecture.experts
    assert experts is not None
    try:
        flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<i4")
        routed = flat.reshape(tokens, architecture.layers, experts.per_token)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"routed_experts: {len(encoded)} base64 characters are not the int32 choices of "
            f"{tokens} tokens in {architecture.layers} layers of {experts.per_token} experts each"
        ) from error
    if routed.size and not 0 <= int(routed.min()) <= int(routed.max()) < experts.count:
        raise ValueError(
            f"routed_experts: {int(routed.min())} to {int(routed.max())}, of experts 0 to "
            f"{experts.count - 1}"
        )
    return routed.astype(np.min_scalar_type(-experts.count))
