"""What the ranks do together: form a group, let rank 0 decide, agree, gather. Everything works without a group too."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.device import Runtime

T = TypeVar("T")
GROUPS = itertools.count()  # groups that this process has formed, one after another, as in a sweep


def grouped() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def join(backend: str, timeout: timedelta | None = None) -> None:
    """Form the process group that the launcher's variables describe; without a launcher, of this process alone."""
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    limit = timeout or dist.default_pg_timeout
    store, own_rank, size = next(dist.rendezvous("env://", timeout=limit))
    # torchrun keeps its store over restarts, and from run to run of a sweep, with the addresses of before (torch 2.13).
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"attempt {attempt} group {next(GROUPS)}", store)
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=timeout)


@contextmanager
def process_group(runtime: Runtime) -> Iterator[None]:
    """Form a group of torchrun's processes for an evaluation; a process that is alone needs none."""
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
    is_ours = runtime.world_size > 1 and not dist.is_initialized()
    if is_ours:
        join(backend_of(runtime.device))
    try:
        yield
    finally:
        if is_ours:
            dist.destroy_process_group()


def from_main(decide: Callable[[], T]) -> T:
    """Return what `decide` returns on rank 0, on every rank; an exception there is raised on every rank."""
    if not grouped():
        return decide()
    parcel: list = [None, None]
    if rank() == 0:
        try:
            parcel[0] = decide()
        except Exception as error:
            parcel[1] = error
    dist.broadcast_object_list(parcel)
    answer, error = parcel
    if error is not None:
        raise error
    return answer


def gather(value: T) -> list[T]:
    """Return `value` of every rank, by rank, on every rank."""
    if not grouped():
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(values: Tensor) -> Tensor:
    """Return the sum over all ranks, on every rank; `values` is changed in place."""
    if grouped():
        dist.all_reduce(values)
    return values


def agree(mean: Tensor, flag: bool) -> tuple[float, bool]:
    """Return the mean of a scalar over all ranks, and whether `flag` is set on any of them, on every rank."""
    values = torch.stack((mean.detach().double(), torch.tensor(float(flag), dtype=torch.double, device=mean.device)))
    mean_sum, flags = total(values).tolist()
    return mean_sum / world_size(), flags > 0
