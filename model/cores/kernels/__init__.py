"""Triton kernels of factor-space attention, for GPUs; with TRITON_INTERPRET=1 they run on a CPU, slowly.

Only `model.cores.flash_tpa.load_kernels` imports this, when there is a GPU: without one Triton need not be there.
"""

from model.cores.kernels.decode import decode
from model.cores.kernels.prefill import prefill

__all__ = ["decode", "prefill"]
