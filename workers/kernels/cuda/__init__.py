"""Triton kernels for NVIDIA GPUs, and their launches."""
