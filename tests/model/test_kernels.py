"""The Triton kernels: their numbers in Triton's interpreter, their code through the compiler for a GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from model.attention.tensor_product import Factors
from model.cores.kernels.gpu import decode, prefill
from model.cores.kernels.gpu.common import INTERPRETED, worth_trying
from model.cores.kernels.gpu.decode import split_kernel
from tests.conftest import ROOT
from tests.model.references import factor_attention
from tests.model.test_factors import SHAPES, random_factors, spoil

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """What `torch.empty` gives is NaN, so that nothing left unwritten looks right."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def to_device(factored):
    parts = (factored.q, factored.k, factored.v)
    return type(factored)(*(Factors(*(None if x is None else x.to(DEVICE) for x in (p.a, p.b, p.c))) for p in parts))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [decode, prefill])
def test_kernels_equal_the_reference(kernel, shape, ragged):
    """More splits and blocks than one, NaN beyond the rows' ends, a row of one key."""
    torch.manual_seed(0)
    n_queries, n_keys, heads, ranks, *rest = SHAPES[shape]
    n_keys, n_queries = (2 * n_keys + 1, min(n_queries, 35)) if n_keys > 1 else (1, 1)
    factored = to_device(random_factors(2, n_queries, n_keys, heads, ranks, *rest[:3], times=rest[3]))
    starts = torch.tensor([n_keys - n_queries, 0], device=DEVICE) if ragged else None
    if ragged:
        spoil(factored, starts)
    out = kernel(factored, 0.2, True, starts, **({"n_splits": 3} if kernel is decode else {}))
    expected = factor_attention(factored, 0.2, True, starts)
    assert expected.isfinite().all()
    assert torch.allclose(out, expected, atol=2e-5 * rest[3] ** 2)


@pytest.mark.parametrize("kernel", [decode, prefill])
def test_one_start_for_all_rows(kernel):
    """A view of one number, as `expand` makes it."""
    torch.manual_seed(0)
    factored = to_device(random_factors(3, 2, 19, 3, (2, 2, 1), 8, 8))
    starts = torch.tensor([4, 17, 17], device=DEVICE)[:1].expand(3)
    assert torch.allclose(kernel(factored, 0.2, True, starts), factor_attention(factored, 0.2, True, starts), atol=2e-5)


@pytest.mark.parametrize("kernel", [decode, prefill])
def test_half_precision_constants_and_no_mask(kernel):
    torch.manual_seed(0)
    factored = random_factors(2, 3, 40, 5, (2, 2, 2), 16, 16, dtype=torch.float16)
    factored.k.b = factored.k.b[:1, :1].expand(2, 40, -1, -1)  # one for all tokens
    factored.v.a = factored.v.a.transpose(2, 3).contiguous().transpose(2, 3)  # ranks apart
    factored = to_device(factored)
    out = kernel(factored, 0.2, causal=False, starts=None)
    expected = factor_attention(factored, 0.2, causal=False)
    assert out.dtype == torch.float16
    assert (out - expected).norm() < 2e-3 * expected.norm()


def test_high_ranks_are_tuned_over_one_configuration():
    configs = [*split_kernel.configs, "small"]
    assert worth_trying(configs, {}, R_K=2, R_V=2) == worth_trying(configs, {}, D=64) == configs
    assert worth_trying(configs, {}, R_K=12, R_V=12) == ["small"]


def test_kernels_compile_for_a_hopper_gpu(tmp_path):
    """Without the interpreter, which this process is in; with the assembler that Triton brings."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.compile_kernels"], cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
