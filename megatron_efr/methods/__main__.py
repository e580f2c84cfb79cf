"""Prints the page of methods."""

from megatron_efr.methods.page import page

print(page(), end="")
