"""Whether Triton's kernels can run here."""

import os


def load_triton(instead: str):
    """Return the module of Triton kernels. ValueError if Triton is not installed, which recommends `instead`."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ValueError(f"Triton is not installed: pip install triton, or use {instead}") from None
    from model.cores.kernels import gpu

    return gpu


def runs_triton(device: str) -> bool:
    """Return whether Triton's kernels run on a device: on a GPU; on a CPU in Triton's interpreter, which tests use."""
    return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
