"""Triton kernels, for GPUs; with TRITON_INTERPRET=1 they run on a CPU, slowly.

Only `model.cores.base.load_kernels` imports this, when there is a GPU: without one Triton need not be there.
"""

from model.cores.kernels.decode import decode
from model.cores.kernels.prefill import prefill
from model.cores.kernels.two_tracks import two_tracks
from model.cores.kernels.two_tracks_backward import two_tracks_backward

__all__ = ["decode", "prefill", "two_tracks", "two_tracks_backward"]
