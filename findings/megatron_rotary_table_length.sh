#!/usr/bin/env bash
# How long a table of rotary angles is decides where Megatron lets packed sequences begin.
#
# megatron-core 0.16.1 (Python 3.11) and 0.19.2 (3.12), torch 2.13.0, CPU, one process.
# One would think: a longer table of angles, of which the first rows are the same, changes nothing.
# Found: where it is exactly as long as the whole pack, positions run on from one sequence into the next; where it is
# longer or shorter, each begins at 0. Two sequences of 4 tokens, all of them equal vectors:
#   angles for 7 positions: the second sequence is turned like the first: True
#   angles for 8 positions: the second sequence is turned like the first: False
#   angles for 9 positions: the second sequence is turned like the first: True
# So sequences that fill a pack to just the length of the table get other numbers than the same ones in another pack.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6 psutil==7.2.2 \
    "megatron-core==0.16.1; python_version < '3.12'" "megatron-core==0.19.2; python_version >= '3.12'"
cat > turned.py <<'PYTHON'
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import TransformerConfig

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, apply_rope_fusion=False)
vectors = torch.ones(8, 2, 8)  # tokens, heads, size of a head
bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
rates = 10000.0 ** (-torch.arange(0, 8, 2) / 8).repeat(2)
for length in (7, 8, 9):
    angles = (torch.arange(length)[:, None] * rates)[:, None, None]
    turned = apply_rotary_pos_emb(vectors, angles, config, bounds, cp_group=dist.group.WORLD)
    same = torch.equal(turned[:4], turned[4:])
    print(f"angles for {length} positions: the second sequence is turned like the first: {same}")
PYTHON
venv/bin/python turned.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
angles for 7 positions: the second sequence is turned like the first: True
angles for 8 positions: the second sequence is turned like the first: False
angles for 9 positions: the second sequence is turned like the first: True
SEEN
