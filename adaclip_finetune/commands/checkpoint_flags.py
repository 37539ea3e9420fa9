"""Kept until evaluate, predict and check import these names from `flags`."""

from adaclip_finetune.commands.flags import add_checkpoint_flags, check_inputs, check_outputs, write_output

__all__ = ["add_checkpoint_flags", "check_inputs", "check_outputs", "write_output"]
