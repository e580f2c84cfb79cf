"""Weights on the move: one Hugging Face <-> Megatron mapping, model folders, and publication to engines."""
