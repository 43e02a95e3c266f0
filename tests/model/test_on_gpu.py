"""What only a GPU shows: kernels at real sizes in bf16, CUDA graphs, a training run next to the CPU's.

T6_TEST_DEVICE=cpu tries these tests themselves without one, at small sizes.
"""

import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from configs.app import configured
from model.attention.base import Dense
from model.attention.tensor_product import Factored, Factors
from model.cores.folding import auto_fold
from model.cores.full import Full
from model.cores.kernels import factors
from model.cores.sequence_tensor import SequenceTensor
from model.cores.sliding_window import SlidingWindow
from model.mask import AttentionMask
from model.transformer import Transformer, split_documents
from tests.model.helpers import FACTORED, PACKAGED, small_network, wake_up
from tests.model.references import factor_attention
from tests.model.test_factors import random_factors
from training.config import Config
from training.jsonl import read_lines

DEVICE = os.environ.get("T6_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "")
LARGE = DEVICE == "cuda"
pytestmark = pytest.mark.skipif(not DEVICE, reason="needs a GPU")


@pytest.fixture(autouse=True)
def exact_products():
    """train.py allows TF32 for its process, where other tests follow."""
    yield
    torch.set_float32_matmul_precision("highest")


def on_device(factored: Factored, dtype) -> Factored:
    def move(part: Factors) -> Factors:
        return Factors(*(None if x is None else x.to(DEVICE, dtype) for x in (part.a, part.b, part.c)))

    return Factored(*map(move, (factored.q, factored.k, factored.v)))


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


# heads, ranks, width: the sizes' own, the paper's benchmark, an odd head count, a converted MHA's
@pytest.mark.parametrize("heads,ranks,width", [(34, (6, 2, 2), 64), (32, (16, 1, 1), 64), (47, (6, 2, 2), 64),
                                               (12, (12, 12, 12), 64), (8, (6, 1, 1), 128)])  # fmt: skip
@pytest.mark.parametrize("n_queries", [1, 4, 1024 if LARGE else 40])
def test_flash_tpa_in_bf16(heads, ranks, width, n_queries):
    torch.manual_seed(0)
    n_keys = (65536 if n_queries == 1 else 8192 if n_queries == 4 else n_queries) if LARGE else 64
    factored = on_device(random_factors(2, n_queries, n_keys, heads, ranks, width, width), torch.bfloat16)
    starts = torch.tensor([n_keys - n_queries, (n_keys - n_queries) // 3], device=DEVICE)
    for given in (None, starts):
        exact = factor_attention(on_device(factored, torch.float32), 0.1, given)
        assert relative(factors.attend(factored, 0.1, given), exact) < 0.02


@pytest.mark.parametrize("length", [1000, 4096, 16384] if LARGE else [70])
@pytest.mark.parametrize("n_axes", [2, 3])
def test_both_tracks_of_a_fold_in_bf16(length, n_axes):
    """Outputs and gradients of `core.kernel=triton`, as close to fp32's as SDPA's bf16 is."""
    torch.manual_seed(0)
    fold = auto_fold(length) if n_axes == 2 else [16, 16, -(-length // 256)]
    exact = [torch.randn(2, length, heads, 64, device=DEVICE).bfloat16() for heads in (6, 2, 2)]
    weight = torch.randn(2, length, 6, 64, device=DEVICE)

    def gradients(dtype, kernel):
        inputs = [x.to(dtype).requires_grad_() for x in exact]
        core = SequenceTensor(fold=fold, kernel=kernel)
        out = core.attend([Dense(*inputs)] * n_axes, AttentionMask(), 0.125)
        return [out, *torch.autograd.grad((out * weight).sum(), inputs)]

    rough = torch.bfloat16 if LARGE else torch.float32  # the interpreter does not multiply bf16
    ours, theirs, wanted = gradients(rough, "triton"), gradients(rough, "sdpa"), gradients(torch.float32, "sdpa")
    for a, b, c in zip(ours, theirs, wanted, strict=True):
        assert relative(a, c) < 1.5 * relative(b, c) + 1e-3


@pytest.mark.parametrize(
    ("model", "kernel"),
    [*((m, "sdpa") for m in PACKAGED), *((m, "factors") for m in FACTORED)] if LARGE else [("t6", "sdpa")],
)
def test_cuda_graphs_generate_the_same_text(model, kernel):
    """Rows of different lengths, twice, so that the second text replays what the first recorded."""
    torch.manual_seed(0)
    net = wake_up(Transformer(small_network(model, f"core.kernel={kernel}", "size.n_layers=1"))).to(DEVICE)
    prompts = [[5, 9, 13], list(range(20, 31)), [7]]
    wanted = net.generate(prompts, 40)
    for _ in range(2):
        assert net.generate(prompts, 40, compiled=True) == wanted


@pytest.mark.parametrize("core", ["full", "sequence_tensor", "sliding_window"])
def test_losses_and_gradients_are_the_cpus(core):
    torch.manual_seed(0)
    own = ["core.fold=[8,16]"] if core == "sequence_tensor" else []
    net = wake_up(Transformer(small_network("t6", f"core={core}", *own)))
    tokens = torch.randint(0, 300, (2, 128))
    found = []
    for device in ("cpu", DEVICE):
        net = net.to(device)
        net.zero_grad()
        loss = net(tokens.to(device), tokens.to(device))
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu().clone() for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-4


def test_a_run_learns_as_on_a_cpu(small_run, tmp_path):
    """Whole runs of train.py, compiled, in bf16 and fp32, next to one on a CPU in fp32."""
    losses = []
    for i, (device, options) in enumerate((
        ("cpu", ["trainer.dtype=fp32"]),
        (DEVICE, ["trainer.dtype=fp32"]),
        (DEVICE, ["trainer.dtype=bf16", "trainer.compile=true"]),
    )):  # fmt: skip
        folder = tmp_path / str(i)
        overrides = [*small_run, *options, f"device={device}", f"run.dir={folder}"]
        assert train.main(configured(Config, overrides)) == 0
        lines = read_lines(folder / "metrics.jsonl")
        losses.append(torch.tensor([line["train/loss"] for line in lines if "train/loss" in line]))
    cpu, exact, rough = losses
    torch.testing.assert_close(exact, cpu, atol=1e-3, rtol=0)
    torch.testing.assert_close(rough, cpu, atol=3e-2, rtol=0)


def test_sdpa_masks_what_lies_beyond_a_row_on_every_backend():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, heads, 64, device=DEVICE) for n, heads in ((1, 8), (300, 2), (300, 2)))
    starts = torch.tensor([7, 299], device=DEVICE)
    ours = Full().attend([Dense(q, k, v)], AttentionMask(starts=starts), 0.125)
    for row, start in enumerate(starts.tolist()):
        here = slice(row, row + 1)
        alone = Dense(q[here], k[here, : start + 1], v[here, : start + 1])
        torch.testing.assert_close(ours[here], Full().attend([alone], AttentionMask(), 0.125))


@pytest.mark.parametrize("core", [Full(), SlidingWindow(window=30)])
@pytest.mark.parametrize("n_groups", [8, 2])
def test_no_mask_takes_the_path_that_forms_all_scores(core, n_groups):
    """Documents, windows, a cache's rows, in bf16 and fp32, with shared heads, of a width that kernels want padded: as
    close to the CPU as rounding is."""
    torch.manual_seed(0)
    exact = [torch.randn(2, 200, heads, width) for heads, width in ((8, 60), (n_groups, 60), (n_groups, 48))]

    def gradients(dtype, device, n_queries, given):
        mask = AttentionMask(**{key: value.to(device) for key, value in given.items()})
        q, k, v = (x.to(device, dtype).requires_grad_() for x in exact)
        out = core.attend([Dense(q[:, :n_queries], k, v)], mask, 0.125)
        return [out.cpu(), *(x.cpu() for x in torch.autograd.grad(out.float().square().sum(), (q, k, v)))]

    documents = split_documents(torch.randint(0, 50, (2, 200)), document_end=0)[1]
    for given in ((200, {}), (200, {"documents": documents}), (100, {"starts": torch.tensor([3, 40])})):
        wanted = gradients(torch.float32, "cpu", *given)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            exact_ones, rough_ones = (gradients(dtype, DEVICE, *given) for dtype in (torch.float32, torch.bfloat16))
        for ours, rough, theirs in zip(exact_ones, rough_ones, wanted, strict=True):
            assert relative(ours, theirs) < 1e-4 and relative(rough, theirs) < 0.03
