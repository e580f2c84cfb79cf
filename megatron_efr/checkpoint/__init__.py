"""Checkpoints: saved by all ranks in Megatron's format, verified, found again, and read as
models.
"""
