"""Sharded and distributed training: gloo ranks on this machine, beside one process that has the whole batch."""
