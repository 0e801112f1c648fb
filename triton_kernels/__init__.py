"""Multi-tensor Triton kernels and their launchers.

Everything here works on a :class:`~optimx.triton_kernels.tensor_table.TensorTable`: the addresses, sizes and
hyperparameters of many tensors, read by one launch. Imports torch and triton, never optimx.
"""
