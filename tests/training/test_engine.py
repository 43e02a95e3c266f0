"""The engine's device."""

from training.engine import import_deepspeed


def test_a_process_may_run_on_one_device_after_another():
    """DeepSpeed chooses its device once in a process, unless it is made to choose anew."""
    for kind in ("cpu", "cuda", "cpu"):
        import_deepspeed(kind)
        from deepspeed.accelerator import get_accelerator

        assert get_accelerator().device_name() == kind
