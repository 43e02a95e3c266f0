"""Triton kernels of factor-space attention, for GPUs; with TRITON_INTERPRET=1 they run on a CPU, slowly."""
