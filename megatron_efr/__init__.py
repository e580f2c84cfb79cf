"""Reinforcement learning that teaches a reasoning model to stop thinking when it is done, on Megatron-Core."""

__version__ = "0.1.0"
