"""How a core attends: through PyTorch, from factors, or by Triton's kernels."""


def load_triton():
    """Return the module of Triton kernels. ValueError if Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ValueError("Triton is not installed: pip install triton, or use core.kernel=sdpa") from None
    from model.cores.kernels import gpu

    return gpu
