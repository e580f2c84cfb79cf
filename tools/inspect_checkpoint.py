"""`efr inspect`, from a checkout: what is in a checkpoint, and whether it verifies."""

from megatron_efr import arguments, inspect_checkpoint

if __name__ == "__main__":
    arguments.run(inspect_checkpoint.main)
