"""Facts of one response that measures are made of: its thought, its reflection words, what it
repeats.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from megatron_efr.rollout.codec import Codec
from megatron_efr.types import Response

REPEATED = 8  # tokens
_POWERS = np.array(
    [0x9E3779B97F4A7C15 ** (i + 1) % 2**64 for i in range(REPEATED)], dtype=np.uint64
)
_REFLECTION = re.compile(
    r"\b(?:wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b", re.IGNORECASE
)


def repetition(tokens: Sequence[int]) -> float:
    """Share of a response's runs of REPEATED tokens that stood in it before; 0 if it is shorter
    than one.
    """
    if len(tokens) < REPEATED:
        return 0.0
    runs = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, dtype=np.uint64), REPEATED)
    hashes = (runs * _POWERS).sum(1)  # modulo 2^64: two others meet as good as never
    return 1.0 - len(np.unique(hashes)) / len(hashes)


def reflections(text: str) -> int:
    """Reflection words in a text: the list of DeepSeek-R1 (Nature 2025, extended data figure 1),
    whole words.
    """
    return len(_REFLECTION.findall(text))


def thinking_tokens(response: Response, closes: str, codec: Codec) -> int | None:
    """Drawn tokens up to the first `closes`, the text that ends a thought, itself included; None
    without it.
    """
    if closes not in response.text:
        return None
    mark = codec.encode(closes)
    if len(mark) == 1 and mark[0] in response.tokens:
        end = response.tokens.index(mark[0]) + 1
    else:  # the fewest tokens whose text has it
        end = bisect_left(
            range(len(response.tokens)),
            True,
            key=lambda count: closes in codec.decode(response.tokens[:count]),
        )
    return int(response.trained[:end].sum())
