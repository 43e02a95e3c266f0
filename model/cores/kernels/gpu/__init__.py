"""Triton kernels, for GPUs; with TRITON_INTERPRET=1 they run on a CPU, slowly.

Only `model.cores.kernels.load_triton` imports this: unless a kernel of these is chosen, Triton need not be installed.
"""

from model.cores.kernels.gpu.decode import decode
from model.cores.kernels.gpu.prefill import prefill
from model.cores.kernels.gpu.two_tracks import two_tracks
from model.cores.kernels.gpu.two_tracks_backward import two_tracks_backward

__all__ = ["decode", "prefill", "two_tracks", "two_tracks_backward"]
