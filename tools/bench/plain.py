"""Qwen2 or Llama and its policy step in torch's own operations only: what cpu.py holds the Megatron
policy against.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig
from turns import Settings, serve, timed_steps


def serve_plain(settings: Settings, folder: Path) -> None:
    """The step of `serve_policy` in plain torch, on its weights and batch."""
    # weights and batches that the other side left
    given = json.loads((folder / "sequences.json").read_text())
    config = AutoConfig.from_pretrained(given["model"]).to_dict()
    model = plain_model(config, torch.load(folder / "weights.pt"))
    batches = [plain_batch(batch, config) for batch in torch.load(folder / "batches.pt")]
    # weights of 16 bits have a float32 copy, which the optimizer changes
    narrow, weights = given["dtype"] != "float32", list(model.weights.values())
    masters = [w.detach().float().requires_grad_() for w in weights] if narrow else weights
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    # PPO's clip in plain torch
    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            logprobs = model.logprobs(batch)
            # the clipped surrogate, each token by its weight
            ratio = (logprobs - batch["columns"]["old_logprob"]).exp()
            advantage, weight = batch["columns"]["advantage"], batch["columns"]["weight"]
            clipped = ratio.clamp(0.8, 1.2) * advantage
            loss = -(weight * torch.minimum(ratio * advantage, clipped)).sum()
            loss.backward()
            total += loss.item()
            if narrow:
                move_gradients(weights, masters)
        # the norm is clipped over the whole update, as Megatron does
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        if narrow:
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
        return total

    def keep_gradients() -> None:
        torch.save(
            {n: m.grad for n, m in zip(model.weights, masters, strict=True)}, folder / "theirs.pt"
        )

    serve(timed_steps(settings, step, keep_gradients))


def move_gradients(weights: list[torch.Tensor], masters: list[torch.Tensor]) -> None:
    """Add the weights' gradients to their float32 copies': bfloat16 sums would lose small ones."""
    for master, weight in zip(masters, weights, strict=True):
        assert weight.grad is not None
        wide = weight.grad.float()
        master.grad = wide if master.grad is None else master.grad.add_(wide)
        weight.grad = None


def plain_batch(batch: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A packed micro-batch with its rotary cosines and sines, and rectangles of similar lengths for
    attention.

    Plain means torch's own operations only. Rectangles padded for the whole model, at 0.7, 0.8 or
    0.9 of the longest row, were no faster than this pack, whose padding only attention sees.
    """
    # each sequence with a prompt of its own: what plain torch does
    if (layout := batch["layout"]) is not None:
        batch["tokens"], batch["positions"] = batch["tokens"][layout], batch["positions"][layout]
        ends = batch["cu_seqlens"].tolist()[1:]
        batch["rows"] = torch.cat(
            [
                torch.arange(end - 1 - n, end - 1)
                for end, n in zip(ends, batch["row_lengths"], strict=False)
            ]
        )
    dim = config["hidden_size"] // config["num_attention_heads"]
    base = config["rope_parameters"]["rope_theta"]
    # rotary cosines and sines of every token
    angles = batch["positions"][:, None] * base ** (-torch.arange(0, dim, 2) / dim)
    batch["cos"], batch["sin"] = (
        angles.cos().repeat(1, 2)[:, None],
        angles.sin().repeat(1, 2)[:, None],
    )
    lengths, starts = batch["lengths"], batch["cu_seqlens"].tolist()
    # sequences of similar length to rectangles, for attention
    buckets: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not buckets or lengths[i] < 0.8 * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(i)
    # each with its padding, and which of its cells are real
    batch["rectangles"], order = [], []
    for bucket in buckets:
        columns = torch.arange(lengths[bucket[0]])[None]
        length = torch.tensor([lengths[i] for i in bucket])[:, None]
        rows = torch.tensor([starts[i] for i in bucket])[:, None] + torch.minimum(
            columns, length - 1
        )
        real = (columns < length).flatten().nonzero()[:, 0]
        batch["rectangles"].append((rows, real))
        order.append(rows.flatten()[real])
    # the way back to packed order
    batch["restore"] = torch.cat(order).argsort()
    return batch


def plain_model(config: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """Qwen2, or Llama without scaled frequencies, without a framework, from its Hugging Face
    tensors; tied or not; log-probs of a packed batch.
    """
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim, eps = config["hidden_size"] // heads, config["rms_norm_eps"]

    # block by block; no framework, no padding
    class Plain:
        def __init__(self) -> None:
            self.weights = {
                name: torch.nn.Parameter(tensor.clone()) for name, tensor in tensors.items()
            }

        # embedding, layers, and the head on the response's rows alone
        def logprobs(self, batch: dict[str, Any]) -> torch.Tensor:
            """[R], of the response tokens."""
            w = self.weights
            x = F.embedding(batch["tokens"], w["model.embed_tokens.weight"])
            for layer in range(config["num_hidden_layers"]):
                at = f"model.layers.{layer}."
                # pre-norm residuals: attention, then the gated MLP
                x = x + self.attention(
                    self.norm(x, at + "input_layernorm.weight"), at + "self_attn.", batch
                )
                h = self.norm(x, at + "post_attention_layernorm.weight")
                gate, up = (
                    F.linear(h, w[f"{at}mlp.{name}_proj.weight"]) for name in ("gate", "up")
                )
                x = x + F.linear(F.silu(gate) * up, w[at + "mlp.down_proj.weight"])
            # a tied model has no head of its own
            head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
            logits = F.linear(
                self.norm(x, "model.norm.weight").index_select(0, batch["rows"]), head
            )
            return -F.cross_entropy(logits.float(), batch["targets"], reduction="none")

        def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
            return F.rms_norm(x, (x.shape[-1],), self.weights[name], eps)

        # rectangle by rectangle, without a mask for padding: it is cut off afterwards
        def attention(self, h: torch.Tensor, at: str, batch: dict[str, Any]) -> torch.Tensor:
            w = self.weights
            q, k, v = (
                F.linear(h, w[f"{at}{n}_proj.weight"], w.get(f"{at}{n}_proj.bias")).unflatten(
                    1, (-1, dim)
                )
                for n in "qkv"  # Llama has no biases
            )
            # rotated in halves, as Hugging Face's weights are laid out
            cos, sin = (batch[name].to(h.dtype) for name in ("cos", "sin"))
            q, k = (x * cos + self.turned(x) * sin for x in (q, k))
            # each sequence sees itself alone, as a row of a rectangle
            done = []
            for rows, real in batch["rectangles"]:
                n, longest = rows.shape
                a, b, c = (
                    x.index_select(0, rows.flatten()).view(n, longest, -1, dim).transpose(1, 2)
                    for x in (q, k, v)
                )
                y = F.scaled_dot_product_attention(
                    a, b, c, is_causal=True, enable_gqa=groups != heads
                )
                done.append(y.transpose(1, 2).flatten(0, 1).index_select(0, real))
            return F.linear(
                torch.cat(done).index_select(0, batch["restore"]).flatten(1),
                w[at + "o_proj.weight"],
            )

        def turned(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1)

    return Plain()
