"""Kernels for GPUs in Triton; TRITON_INTERPRET=1, set before the first import, runs them on CPU tensors."""
