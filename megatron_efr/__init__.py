"""Reinforcement learning that teaches a reasoning model to stop thinking when it is done, on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron warns in every module that would use them; they are optional here, and the local layers stand in
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).* not installed", category=UserWarning)
# and about a default of its own
warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
