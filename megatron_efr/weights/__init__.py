"""Tensors at rest: what config.json says, the one Hugging Face <-> Megatron mapping, and model
folders.
"""
