"""Rates that a GPU was measured at, to hold other times against: what a limit or a least time is computed from."""

from __future__ import annotations

# A large matrix product in bf16, by CUDA events, torch 2.11 with CUDA 13.0. NVIDIA's data sheet says 989 (dense).
# kernels/NOTES.md holds its kernels against the same rate.
MATMUL_TFLOPS, MATMUL_DEVICE = 778.0, "NVIDIA H200"
