"""Triton kernels of the ops: CUDA, and CPU tensors under the interpreter of the tests."""
