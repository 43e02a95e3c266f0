"""Evaluation on several processes: each takes its share, and all end with the same result."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from training.setup import Runtime, join


@contextmanager
def process_group(runtime: Runtime) -> Iterator[None]:
    """torchrun's processes as one group (nccl on GPUs, gloo on CPUs); a process that is alone needs none."""
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
    if runtime.world_size == 1 or dist.is_initialized():
        yield
        return
    join("nccl" if runtime.device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def grouped() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """(this process's rank, the number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(values: Tensor) -> Tensor:
    """The sum over all ranks, on every rank; `values` is changed in place."""
    if grouped():
        dist.all_reduce(values)
    return values


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' values, on every rank."""
    if not grouped():
        return value
    number = torch.tensor(value, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)


def together(parts: dict) -> dict:
    """The ranks' dicts as one, on every rank."""
    if not grouped():
        return parts
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, parts)
    return {key: value for one in gathered for key, value in one.items()}


def from_main(make):
    """What `make()` returns on rank 0, on every rank; an exception there is raised everywhere."""
    if not grouped():
        return make()
    parcel = [None, None]
    if dist.get_rank() == 0:
        try:
            parcel[0] = make()
        except Exception as error:
            parcel[1] = error
    dist.broadcast_object_list(parcel)
    if parcel[1] is not None:
        raise parcel[1]
    return parcel[0]
