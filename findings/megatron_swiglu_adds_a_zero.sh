#!/usr/bin/env bash
# Megatron's SwiGLU keeps a copy of its second half for the backward pass, since it adds an offset of 0 to it.
#
# megatron-core 0.16.1 (Python 3.11) and 0.19.2 (3.12), torch 2.13.0, CPU, one process.
# One would think: without fusion, and with the default glu_linear_offset of 0, an MLP computes SiLU(gate) * up, and keeps what that does.
# Found, of 256 tokens, hidden 64, ffn 128, float32, besides input and weights, in [tokens, ffn]:
#   SiLU(gate) * up and a product: 4.0
#   megatron: 5.0
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
venv/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6 psutil==7.2.2 \
    "megatron-core==0.16.1; python_version < '3.12'" "megatron-core==0.19.2; python_version >= '3.12'"
cat > kept.py <<'PYTHON'
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
config = TransformerConfig(
    num_layers=1, hidden_size=64, num_attention_heads=1, ffn_hidden_size=128, gated_linear_unit=True,
    activation_func=F.silu, add_bias_linear=False, use_cpu_initialization=True, perform_initialization=False,
    bias_activation_fusion=False, gradient_accumulation_fusion=False,
)
mlp = MLP(config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
          tp_group=parallel_state.get_tensor_model_parallel_group())
for weight in mlp.parameters():
    torch.nn.init.ones_(weight)
x = torch.ones(256, 1, 64, requires_grad=True)


def plain(x: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, mlp.linear_fc1.weight).chunk(2, -1)
    return F.linear(F.silu(gate) * up, mlp.linear_fc2.weight)


def kept(function: Callable[[torch.Tensor], object]) -> float:
    """Bytes of what autograd keeps beside input and weights, over those of [tokens, ffn]."""
    given = {each.untyped_storage().data_ptr() for each in (x, *mlp.parameters())}
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(x)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in saved}
    return sum(size for place, size in storages.items() if place not in given) / (4 * 256 * 128)


print(f"SiLU(gate) * up and a product: {kept(plain):.1f}")
print(f"megatron: {kept(mlp):.1f}")
PYTHON
venv/bin/python kept.py 2>/dev/null | tee seen
diff seen - <<'SEEN'
SiLU(gate) * up and a product: 4.0
megatron: 5.0
SEEN
