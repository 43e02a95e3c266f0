"""Shared by all tests: one thread a process (the tensors are small), no W&B server, and data prepared once."""

import os
import pydoc_data.topics
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch

from configs.app import compose
from configs.schema import load
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


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> list[str]:
    """Overrides for data prepared from Python's own help topics: about 0.4 MB of text, a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("data")
    for name, text in sorted(pydoc_data.topics.topics.items()):
        (folder / f"{name.replace(' ', '_')}.txt").write_text(text, encoding="utf-8")
    overrides = [f"data.files=['{folder}/*.txt']", f"data.dir={folder}/shards"]
    prepare(load(compose("train", [*SMALL_RUN, *overrides])), progress=False)
    return overrides


@pytest.fixture
def small_run(small_data, tmp_path) -> list[str]:
    """Overrides for a run of 8 steps on that data, in a folder of its own."""
    return [*SMALL_RUN, *small_data, f"run.dir={tmp_path}/run"]
