"""The Triton kernels: their numbers in Triton's interpreter, their code through the compiler for a GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from model.attention.tensor_product import Factors
from model.cores.factor_space import reference
from model.cores.kernels import decode, prefill
from model.cores.kernels.common import INTERPRETED
from tests.conftest import ROOT
from tests.model.test_flash_tpa import SHAPES, random_factors, spoil

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
    expected = reference(factored, 0.2, True, starts)
    assert expected.isfinite().all()
    assert torch.allclose(out, expected, atol=2e-5 * rest[3] ** 2)


@pytest.mark.parametrize("kernel", [decode, prefill])
def test_one_start_for_all_rows(kernel):
    """A view of one number, as `expand` makes it."""
    torch.manual_seed(0)
    factored = to_device(random_factors(3, 2, 19, 3, (2, 2, 1), 8, 8))
    starts = torch.tensor([4, 17, 17], device=DEVICE)[:1].expand(3)
    assert torch.allclose(kernel(factored, 0.2, True, starts), reference(factored, 0.2, True, starts), atol=2e-5)


@pytest.mark.parametrize("kernel", [decode, prefill])
def test_sigmoid_half_precision_constants_and_no_mask(kernel):
    torch.manual_seed(0)
    factored = random_factors(2, 3, 40, 5, (2, 2, 2), 16, 16, dtype=torch.float16)
    factored.k.b = factored.k.b[:1, :1].expand(2, 40, -1, -1)  # one for all tokens
    factored.v.a = factored.v.a.transpose(2, 3).contiguous().transpose(2, 3)  # ranks apart
    factored = to_device(factored)
    out = kernel(factored, 0.2, causal=False, sigmoid=True)
    for part in (factored.q, factored.k, factored.v):
        part.a = part.a.float().sigmoid()
    expected = reference(factored, 0.2, causal=False)
    assert out.dtype == torch.float16
    assert (out - expected).norm() < 2e-3 * expected.norm()


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from model.cores.kernels.decode import CONFIGS, merge_kernel, split_kernel
from model.cores.kernels.prefill import CONFIGS as PREFILL, prefill_kernel

SHAPE = dict(H=34, R_Q=6, R_K=2, R_V=2, DENSE_Q=False, D=64, D_B=64, E=64, E_B=64, BLOCK_D=64, BLOCK_E=64, CAUSAL=True,
             RAGGED=True, SIGMOID=True, PRECISION="ieee")

def build(kernel, constants, num_warps=4, num_stages=2):
    kernel = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    types = {"partial": "*fp32", "lse": "*fp32", "starts": "*i64", "out": "*bf16", "scale": "fp32"}
    factors = {f"{letter}_{part}": "*bf16" for letter in "abc" for part in "qkv"}
    signature = {p.name: "constexpr" if p.is_constexpr else (types | factors).get(p.name, "i32") for p in kernel.params}
    aligned = [i for i, p in enumerate(kernel.params) if signature[p.name] in ("*bf16", "i32")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=num_warps, num_stages=num_stages))
    assert built.metadata.shared <= 232448, built.metadata.shared  # of a multiprocessor of an H100
    return built.asm["ptx"]

for kernel, config, more in ((split_kernel, CONFIGS[0], {"BLOCK_C": 64}), (prefill_kernel, PREFILL[2], {})):
    blocks = {key: value for key, value in config.items() if key.isupper()}
    ptx = build(kernel, SHAPE | more | blocks, config["num_warps"], config["num_stages"])
    assert "wgmma.mma_async" in ptx and "cp.async" in ptx  # tensor cores, fed while they work
# The last configuration of each fits where the others ask for more than there is.
WIDE = SHAPE | dict(H=8, R_K=3, R_V=3, D=256, D_B=256, E=256, E_B=256, BLOCK_D=256, BLOCK_E=256)
for kernel, more in ((split_kernel, {"BLOCK_C": 16}), (prefill_kernel, {})):
    last = kernel.configs[-1]
    build(kernel, WIDE | more | last.kwargs, last.num_warps, last.num_stages)
build(merge_kernel, dict(R_V=2, E=64, BLOCK_E=64, BLOCK_SPLITS=64))
"""


def test_kernels_compile_for_a_hopper_gpu(tmp_path):
    """To PTX and machine code, with the assembler that Triton brings; no GPU needed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    file = tmp_path / "build.py"
    file.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, file], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
