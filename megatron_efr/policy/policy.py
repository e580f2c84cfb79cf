"""The policy as the programs see it: log-probs, updates, the initial model for reference, and
weights to publish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model

from megatron_efr import log
from megatron_efr.algorithms.objective import Aggregate, Objective
from megatron_efr.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_efr.kernels import Backend, choose_backend
from megatron_efr.memory import attention_share, micro_batch_tokens
from megatron_efr.policy import context
from megatron_efr.policy.credits import fill_advantages
from megatron_efr.policy.divisibility import check_fit, te_layers
from megatron_efr.policy.head import HeadRows, build_head, loss_scaling
from megatron_efr.policy.layers import packed_sequences
from megatron_efr.policy.logprob_check import (
    drift_figures,
    drift_sums,
    fill_behaviour,
    fill_importance,
)
from megatron_efr.policy.lora import alpha_state
from megatron_efr.policy.loss import Loss, Metrics, as_means, combine
from megatron_efr.policy.model import PolicyModel, build_chunks, transformer_config
from megatron_efr.policy.optimizer import Optimizer
from megatron_efr.policy.packing import (
    SharedPrompt,
    UpdateShares,
    balance,
    check_tokens,
    costs,
    multiples,
    pack,
    round_up,
    row_weights,
    sequence_flops,
)
from megatron_efr.policy.parameters import Parameters
from megatron_efr.policy.ranks import Ranks
from megatron_efr.policy.reference import Reference
from megatron_efr.policy.routing import RoutingReplay, lay_out_routing
from megatron_efr.publication.bucket_plan import BUCKET_BYTES
from megatron_efr.publication.reshard import Parcel
from megatron_efr.samples import PackedBatch, Sample, SequenceSize
from megatron_efr.types import ByIndex, UserError
from megatron_efr.weights.architecture import Architecture
from megatron_efr.weights.folder import fingerprint, initial_weights, save_folder
from megatron_efr.weights.lora import save_adapter
from megatron_efr.weights.mapping import WeightMapping


class Policy:
    """A Megatron model under the configured parallelism, with its optimizer. Every rank holds one
    and calls it alike.

    `temperature` is the sampler's: log-probs are those of the distribution that the responses were
    drawn from.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        ranks: Ranks,
        *,
        updates: int,
        seed: int,
        temperature: float = 1.0,
        keep_reference: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
        architecture: Architecture | None = None,
    ) -> None:
        self.ranks = ranks
        self.model_config = model
        # refused by config.json alone, before a weight is read
        self.architecture = architecture or Architecture.from_folder(model.path)
        check_fit(model, parallel, self.architecture)
        self.config = transformer_config(model, self.architecture, parallel)
        self._flops = sequence_flops(self.architecture)
        on_gpu = ranks.device.type == "cuda"
        self._micro_batch_tokens = micro_batch_tokens(
            self.architecture, parallel, model.dtype, on_gpu
        )
        # Megatron's model chunks, with routers that replay the engine's choices
        engine = te_layers(model)
        self.chunks = build_chunks(
            self.config, self.architecture, parallel, engine, ranks.device, model.lora
        )
        self._routing = RoutingReplay(
            self.config, [_unwrapped(chunk) for chunk in self.chunks], ranks
        )
        # the head on the last stage
        self._kernels: Backend
        self._kernels, reason = choose_backend(model.kernels)
        if ranks.is_main:
            log.info(f"kernels: {self._kernels} ({reason})")
        last = _unwrapped(self.chunks[-1])
        vocab = self.architecture.vocab
        self._head = build_head(
            last, vocab, model.head_chunk_tokens, ranks, temperature, self._kernels
        )
        # sequences split evenly over ranks, batches into whole rounds of virtual stages
        self._sequence_multiple, self._pack_multiple = multiples(parallel)
        # attention of our own knows prompts that responses share; routers would count them once
        self._share_prompts = (
            not engine and not self.architecture.experts and self._pack_multiple == 1
        )
        self._repeated = attention_share(self.architecture, parallel, model.dtype)
        self._batch_multiple = parallel.pipeline if parallel.virtual_pipeline is not None else 1
        # weights in, by the one mapping; the reference is a copy of them
        mapping = WeightMapping(
            self.architecture,
            parallel.tensor,
            expert_ranks=parallel.expert,
            expert_rank=ranks.expert_rank,
        )
        self.parameters = Parameters(self.chunks, mapping, ranks, bucket_bytes)
        self.parameters.load(initial_weights(model, self.architecture, seed))
        self.parameters.draw_adapters(seed)
        seed_of_weights = seed if model.init == "random" else None
        self.initial_model = {
            "path": model.path,
            "sha256": ranks.share(lambda: fingerprint(model.path, seed_of_weights)),
        }
        self._reference = Reference(self.parameters) if keep_reference else None
        # the optimizer, whose scale the schedule applies to losses
        self.optimizer = Optimizer(optimizer, model.dtype, updates, self.chunks)
        self.config.grad_scale_func = self.optimizer.megatron.scale_loss

    @classmethod
    def to_train(
        cls, config: TrainConfig, architecture: Architecture, ranks: Ranks, *, keep_reference: bool
    ) -> Policy:
        """The policy of a reinforcement-learning run."""
        return cls(
            config.model,
            config.parallel,
            config.optimizer,
            ranks,
            updates=config.train.iterations * config.train.updates,
            seed=config.seed,
            temperature=config.rollout.temperature,
            keep_reference=keep_reference,
            bucket_bytes=config.rollout.bucket_mib * 2**20,
            architecture=architecture,
        )

    # -- batches
    # ----------------------------------------------------------------------------------------------

    def plan_update(
        self,
        sizes: ByIndex[SequenceSize],
        update: list[int],
        micro_batch_tokens: int | None,
        aggregate: Aggregate,
        divisor: int | None = None,
    ) -> UpdateShares:
        """Deal the sequences `i in update` to replicas and micro-batches: the same on every rank.

        A micro-batch has `micro_batch_tokens` at most, or as many as suit the device. `aggregate`
        and `divisor` as `Objective` has them.
        """
        # a sequence takes its padded length, and costs its FLOPs
        lengths = {i: round_up(sizes[i].length, self._sequence_multiple) for i in update}
        budget = micro_batch_tokens or self._micro_batch_tokens
        # what is laid once is kept together
        prompts = None
        if self._share_prompts:
            prompts = {i: SharedPrompt(sizes[i].prompt_id, sizes[i].prompt) for i in update}
        shares = balance(
            lengths,
            self.ranks.replicas,
            budget,
            self._batch_multiple,
            self._flops,
            prompts,
            self._repeated,
        )
        return UpdateShares(shares, row_weights(sizes, update, aggregate, divisor))

    def pack(self, samples: ByIndex[Sample], plan: UpdateShares) -> list[PackedBatch]:
        """This replica's micro-batches of a planned update, of which `samples` must have this
        replica's own.

        UserError for a token outside the vocabulary.
        """
        check_tokens(samples, plan.own(self.ranks.replica), self.architecture.vocab)
        batches = [
            pack(
                samples,
                indices,
                plan.weights,
                self.ranks.device,
                self._pack_multiple,
                self._sequence_multiple,
                self._share_prompts,
            )
            for indices in plan.shares[self.ranks.replica]
        ]
        for batch in batches if self.model_config.routing == "replay" else []:
            batch.routed_experts = lay_out_routing(batch, samples, self.architecture)
        return batches

    def pack_update(
        self,
        samples: Sequence[Sample],
        update: list[int],
        micro_batch_tokens: int | None,
        aggregate: Aggregate,
    ) -> list[PackedBatch]:
        """`plan_update` and `pack` in one, if every rank has all samples."""
        # of an update alone: there may be very many samples
        sizes = {i: samples[i].size for i in update}
        return self.pack(samples, self.plan_update(sizes, update, micro_batch_tokens, aggregate))

    # -- forward, backward, step
    # --------------------------------------------------------------------------------------

    def score(self, batches: list[PackedBatch]) -> None:
        """Fill every micro-batch's column `old_logprob` and, if a reference is kept,
        `reference_logprob`.

        Computed in the micro-batches that will be trained on, so the first update sees a ratio of
        exactly 1. The reference routes for itself: the KL refers to the initial model, and its
        routers are part of it.
        """
        for batch, logprobs in zip(batches, self.logprobs(batches), strict=True):
            batch.columns["old_logprob"] = logprobs
        # the same micro-batches under the initial weights
        if self._reference is not None:
            with self._reference.in_place():
                reference = self.logprobs(
                    [replace(batch, routed_experts=None) for batch in batches]
                )
            for batch, logprobs in zip(batches, reference, strict=True):
                batch.columns["reference_logprob"] = logprobs

    def fill_columns(self, batches: list[PackedBatch], objective: Objective) -> None:
        """Fill `behaviour_logprob` and `importance`, and make of `advantage` what the loss reads:
        `drift`, `credits`.

        The log-probs must be there.
        """
        fill_behaviour(batches)
        fill_importance(batches, objective.importance)
        fill_advantages(batches, objective, self.ranks.sum_over_replicas, self._kernels)

    def logprobs(self, batches: list[PackedBatch]) -> list[torch.Tensor]:
        """Log-probs [R] of each micro-batch's response tokens under the current weights, on every
        rank alike.
        """
        outputs = self._run(batches, _only_logprobs, forward_only=True)
        if self.ranks.pipeline_ranks == self.ranks.context_ranks == 1:
            return [output["logprobs"] for output in outputs]
        # each row from the one rank that has it, to all
        sizes = [batch.rows.numel() for batch in batches]
        flat = torch.zeros(sum(sizes), device=self.ranks.device)
        if self.ranks.is_last_stage:
            for whole, batch, output in zip(flat.split(sizes), batches, outputs, strict=True):
                whole[self._own_rows(batch)] = output["logprobs"]
            if self.ranks.context_ranks > 1:  # every row has one owner; the others add exactly 0
                dist.all_reduce(flat, group=self.ranks.context_group)
        flat = self.ranks.from_last_stage(flat.cpu()).to(self.ranks.device)
        return list(flat.split(sizes))

    def _own_rows(self, batch: PackedBatch) -> torch.Tensor | slice:
        """The rows of a micro-batch that this context rank computes."""
        if self.ranks.context_ranks == 1:
            return slice(None)
        return context.own_rows(batch, self.ranks.context_rank, self.ranks.context_ranks)

    def compare_logprobs(self, batches: list[PackedBatch], version: int = 0) -> dict[str, float]:
        """`drift_figures` over all replicas; tokens of weights older than `version` are told
        apart.
        """
        own = batches if self.ranks.context_rank == 0 else []  # the others know the same
        sums = [drift_sums(batch, version) for batch in own if batch.indices]
        return drift_figures(self._over_replicas(combine(sums)))

    def update(self, batches: list[PackedBatch], loss: Loss) -> dict[str, float]:
        """One optimizer update from this replica's micro-batches; the loss's figures over all
        replicas, and the step's.

        `skipped` is 1 if the gradient was not finite and no step was made. `imbalance` is by how
        much the busiest replica's FLOPs exceed the least that any split of the sequences could give
        it: max(mean, longest sequence).
        """
        self.optimizer.zero_grad()
        outputs = self._run(batches, loss, forward_only=False)
        # Megatron reduces gradients, clips and steps; figures are summed over replicas
        made, norm = self.optimizer.step()
        metrics = self._over_replicas(combine(outputs) | self._work(batches))
        # the work of this update, as it was dealt
        total, busiest, longest = (
            metrics.pop(name) for name in ("flops", "flops_max", "longest_max")
        )
        metrics = as_means(metrics)
        metrics["imbalance"] = busiest / max(total / self.ranks.replicas, longest) - 1.0
        return metrics | {
            "grad_norm": norm,
            "lr": self.optimizer.lr,
            "skipped": 0.0 if made else 1.0,
        }

    def _work(self, batches: list[PackedBatch]) -> dict[str, float]:
        """This replica's FLOPs, stated by its first context rank."""
        first = batches if self.ranks.context_rank == 0 else []
        own = [work for batch in first for work in costs(batch, self._flops)]
        return {"flops": sum(own), "flops_max": sum(own), "longest_max": max(own, default=0.0)}

    def _run(self, batches: list[PackedBatch], loss: Loss, *, forward_only: bool) -> list[Metrics]:
        """Drive Megatron's schedule; per micro-batch, on the last stage, what the loss measured."""
        for chunk in self.chunks:
            chunk.train(not forward_only)
        # Megatron's own schedule; routers forget what they replayed when the pass is over
        schedule = get_forward_backward_func()
        with torch.set_grad_enabled(not forward_only), self._routing.forgotten_at_the_end():
            outputs = schedule(
                forward_step_func=self._forward_step(loss, len(batches)),
                data_iterator=[iter(batches) for _ in self.chunks]
                if len(self.chunks) > 1
                else iter(batches),
                model=list(self.chunks) if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(batches),
                seq_length=max(batch.tokens.numel() for batch in batches),
                micro_batch_size=1,
                forward_only=forward_only,
            )
        return cast(list[Metrics], outputs)

    def _forward_step(
        self, loss: Loss, micro_batches: int
    ) -> Callable[..., tuple[torch.Tensor, Any]]:
        undo, factor = loss_scaling(self.config, self.ranks, micro_batches)
        finish_gather = cache(self.parameters.finish_gather)  # once in a pass

        def step(
            batches: Iterator[PackedBatch], chunk: torch.nn.Module
        ) -> tuple[torch.Tensor, Any]:
            batch = context.part(next(batches), self.ranks.context_rank, self.ranks.context_ranks)
            with self._routing.replayed(_unwrapped(chunk), batch):
                hidden = chunk(
                    input_ids=batch.tokens[None],
                    position_ids=batch.positions[None],
                    attention_mask=None,
                    packed_seq_params=packed_sequences(
                        batch.lengths, batch.cu_seqlens, self.ranks.context_ranks, batch.layout
                    ),
                )

            def measure(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
                assert self._head is not None
                # the head reads its weight without calling the module that holds it
                finish_gather()
                value, metrics = loss(self._head.rows(hidden, batch, factor))
                # 0 tokens: the loss is normalised already, divide by nothing
                return value * undo, torch.zeros((), dtype=torch.int, device=value.device), metrics

            return hidden, measure  # Megatron measures on the last stage

        return step

    def _over_replicas(self, metrics: dict[str, float]) -> dict[str, float]:
        """This replica's figures combined with all others', on every rank; they stand on the last
        stage only.
        """
        if self.ranks.world_size == 1:
            return metrics
        everyone: list[Any] = [None] * self.ranks.world_size
        mine = metrics if self.ranks.is_last_stage and self.ranks.tensor_rank == 0 else None
        dist.all_gather_object(everyone, mine, group=self.ranks.cpu_world)
        # a replica of empty micro-batches has none
        return combine([figures for figures in everyone if figures])

    # -- weights
    # ----------------------------------------------------------------------------------------------

    def parcels(self, *, flat: bool = False, everywhere: bool = False) -> Iterator[Parcel]:
        """The weights as whole Hugging Face tensors, bucket by bucket: see `Parameters.parcels`."""
        return self.parameters.parcels(flat=flat, everywhere=everywhere)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) pairs on rank 0, bucket by bucket; empty tensors
        elsewhere.

        All ranks iterate together. If nothing is split the tensors are views of the parameters;
        those with adapters are added up for the bucket.
        """
        return (pair for parcel in self.parcels() for pair in parcel.tensors)

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Like `named_weights`, of the last update's gradients, clipped if that is on; adapters' by
        PEFT's names.
        """
        self.optimizer.gather_gradients()
        if self.parameters.adapted:
            return iter(self.parameters.adapter_tensors("gradients").items())
        return (pair for parcel in self.parameters.parcels("gradients") for pair in parcel.tensors)

    def save_folder(self, destination: str | Path) -> None:
        """Write the weights as a Hugging Face folder, with the starting model's tokenizer and
        configuration.
        """
        if self.ranks.is_main:
            save_folder(destination, self.named_weights(), self.model_config.path)
        else:
            # weights are gathered by all ranks together, whoever writes them
            for _ in self.named_weights():
                pass
        # nobody goes on before the folder is whole
        self.ranks.barrier()

    def save_adapter(self, destination: str | Path) -> None:
        """Write the adapters alone as a PEFT folder; nothing if none are trained."""
        if (lora := self.model_config.lora) is None:
            return
        tensors = self.parameters.adapter_tensors()
        self.ranks.on_main(lambda: save_adapter(destination, tensors, lora, self.model_config.path))

    # -- checkpoints
    # ----------------------------------------------------------------------------------------------

    def sharded_state(self, *, loading: bool = False) -> dict[str, Any]:
        """Model and optimizer as Megatron's sharded state dict: what a checkpoint saves, or the
        shape it loads into.
        """
        self.parameters.finish_gather()
        models = {
            f"model{i}": _unwrapped(chunk).sharded_state_dict()
            for i, chunk in enumerate(self.chunks)
        }
        beside = alpha_state(self.model_config.lora, self.ranks.rank)
        return models | beside | {"optimizer": self.optimizer.sharded_state(models, loading)}

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take up a loaded checkpoint's model and optimizer. The reference stays the initial
        model.
        """
        for i, chunk in enumerate(self.chunks):
            _unwrapped(chunk).load_state_dict(state[f"model{i}"])
        self.optimizer.load_sharded_state(state["optimizer"])

    # -- between phases
    # ----------------------------------------------------------------------------------------------

    def offload_training_state(self) -> None:
        """Gradients and optimizer state leave the device, for an engine that shares it; weights can
        still be read.

        Log-probs, publication and a checkpoint need no more. RuntimeError if they left already.
        """
        self.parameters.finish_gather()
        self.optimizer.offload()

    def restore_training_state(self) -> None:
        """Take both back, before the next log-probs or update. RuntimeError if they have not
        left.
        """
        self.optimizer.restore()

    # -- the initial model
    # --------------------------------------------------------------------------------------------

    def check_initial_model(self, saved: Mapping[str, str], source: str) -> None:
        """UserError for a checkpoint of another initial model: the KL would refer to it."""
        if saved["sha256"] != self.initial_model["sha256"]:
            raise UserError(
                f"{source}: was trained from {saved['path']} (SHA-256 {saved['sha256'][:12]}...), "
                f"and model.path = {self.initial_model['path']} now holds other weights "
                f"({self.initial_model['sha256'][:12]}...); put the initial model back, since the "
                "KL term refers to it"
            )


def _unwrapped(chunk: torch.nn.Module) -> PolicyModel:
    """The model inside Megatron's DDP and precision wrappers."""
    return cast(PolicyModel, unwrap_model(chunk))


def _only_logprobs(rows: HeadRows) -> tuple[torch.Tensor, Metrics]:
    """In a loss's place, if nothing is trained."""
    logprobs = rows.logprobs()
    return logprobs.new_zeros(()), {"logprobs": logprobs}
