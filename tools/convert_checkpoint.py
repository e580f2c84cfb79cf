"""`efr convert`, from a checkout: Hugging Face folder to Megatron checkpoint, and back."""

from megatron_efr import arguments, convert

if __name__ == "__main__":
    arguments.run(convert.main)
