"""Reinforcement learning that teaches a reasoning model to stop thinking when it is done, on
Megatron-Core.
"""

import logging
import warnings

__version__ = "0.1.0"

# What libraries say of themselves, to whoever uses them, about nothing that a user of this one
# could change.
_WARNINGS = (
    # from every module that would use them; local layers stand in
    "(Transformer Engine|Apex).* not installed",
    "full scope is deprecated",  # Megatron, of a default of its own
    "MimoModelConfig is experimental",  # a kind of model that is imported with the others
    # torch, of how Megatron reads and writes checkpoints
    "The argument order of load has been changed|torch.distributed is disabled, unavailable",
    "`load_state_dict` is deprecated|Please use DTensor instead",
    # torch, of how Megatron's distributed optimizer reduces gradients
    r"`torch\.distributed\.\w+` is deprecated|The .grad attribute of a Tensor that is not a leaf",
)
_RECORDS = {
    # a compiler without a GPU; nothing here asks for it
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # for one that Megatron-Core 0.16 has not
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # DistributedDataParallel makes the layout itself, as its caller would
    "megatron.core.distributed.distributed_data_parallel": (
        "DistributedDataParallel: full_param_layout not provided"
    ),
    # of a checkpoint from 0.16
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}
for _words in _WARNINGS:
    warnings.filterwarnings("ignore", message=f".*({_words})", category=UserWarning)
    warnings.filterwarnings("ignore", message=f".*({_words})", category=FutureWarning)
for _name, _words in _RECORDS.items():
    logging.getLogger(_name).addFilter(
        lambda record, words=_words: not record.getMessage().startswith(words)
    )
