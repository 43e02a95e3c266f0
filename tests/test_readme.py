"""Every command of README.md works as written: composed as it stands, then run, shrunk to a few steps."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs.app import compose
from configs.load import load
from tests.conftest import ROOT, SMALL_MLA, SMALL_RUN

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.splitlines()
    if shlex.split(line, comments=True)
]
TRAINING = [words for words in COMMANDS if "train.py" in words]
SHRINK = [o for o in SMALL_RUN if not o.startswith(("data=", "tokenizer."))]


@pytest.fixture(scope="module")
def checkout(small_data, tmp_path_factory):
    """A copy of the tracked files with a trained runs/first and a corpus/, to run commands in."""
    folder = tmp_path_factory.mktemp("readme") / "t6"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    write_shards(folder / "fineweb10B")
    (folder / "corpus").mkdir()
    texts = [path.read_text() for path in sorted((small_data_folder(small_data)).glob("*.txt"))]
    (folder / "corpus/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(folder, [sys.executable, "train.py", "run.name=first", *SMALL_RUN, *small_data])
    return folder


def write_shards(folder):
    """What llm.c's scripts leave."""
    folder.mkdir()
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 20_000
    for split in ("train", "val"):
        tokens = np.arange(20_000, dtype="<u2")
        (folder / f"fineweb_{split}_000000.bin").write_bytes(header.tobytes() + tokens.tobytes())


def small_data_folder(small_data):
    from pathlib import Path

    return Path(small_data[1].removeprefix("data.dir=")).parent


def run(folder, command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def shrink(words: list[str], small_data: list[str]) -> list[str]:
    if words[0] == "make":
        return ["make", "-n", *words[1:]]  # the recipes install; .ci/run and the tests run what they run
    if words[0] == ".venv/bin/pre-commit":
        return [sys.executable, "-m", "pre_commit", "validate-config"]
    python = (
        [sys.executable] if words[0] == "python" else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    )
    rest = ["--nproc_per_node=2" if word.startswith("--nproc_per_node") else word for word in words[1:]]
    if words[0] == "sbatch":  # tests/slurm runs the scripts
        at = next(index for index, word in enumerate(words) if word.endswith(".sbatch"))
        command = {"slurm/train.sbatch": ["train.py"], "slurm/prepare.sbatch": ["-m", "data.prepare"]}[words[at]]
        return [sys.executable, *command, *words[at + 1 :], "--cfg", "job"]
    if "slurm.submit" in rest:
        kept = [word for word in rest if not word.startswith(("data=", "tokenizer="))]
        alone = ["--nodes=1", "--ntasks-per-node=1", "--dry-run", "data=files", "tokenizer.vocab_size=512"]
        return [*python, *kept, *SHRINK, *alone, *small_data]
    if any(word.startswith("data=fineweb") for word in rest):
        return [*python, *rest, "--cfg", "job"]  # from the hub
    if any(word in rest for word in ("suite=paper_zeroshot", "suite=harness")):
        return [sys.executable, *(w for w in rest if not w.startswith("--nproc")), "--cfg", "job"]  # from the hub
    if "suite=builtin_cloze" in rest:
        return [*python, *rest, "suite.tasks=[cloze]", "limit=4"]  # on the small data
    if "suite=long_context" in rest:
        own = [word for word in rest if not word.startswith("suite.files")]
        return [*python, *own, "suite.lengths=[32,128]", "suite.trials=1", "limit=2"]
    if "eval.speed.decoding" in rest:
        rest = [word for word in rest if not word.startswith(("d_models=", "size=", "lengths=", "batches="))]
        return [*python, *rest, "size=tiny", "size.n_layers=1", "lengths=[64]", "batches=[1]", "rounds=1"]
    if "eval.speed.training" in rest:
        return [*python, *rest, "size=tiny", "trainer.seq_len=32", "steps=1"]
    if "data.benchmark" in rest:
        return [*python, *rest, "text_bytes=200000", "rounds=1"]
    if "eval.compare" in rest:  # of the one run there is, and with the reference that every run leaves
        there = {"runs/mechanisms": "runs/first", "runs/elastic": "runs/first"}
        there |= {} if "update=true" in rest else {"reference=reference.json": "reference=runs/first/summary.json"}
        return [*python, *(there.get(word, word) for word in rest)]
    if "eval.speed.attention" in rest:
        return [*python, *rest, "lengths=[64,128]", "rounds=1", "n_heads=1"]
    if "train.py" not in rest or "--cfg" in rest:
        return [*python, *rest]
    own_data = (
        []
        if any(word.startswith("data=") for word in rest)
        else ["data=files", "tokenizer.vocab_size=512", *small_data]
    )
    mla = SMALL_MLA if "model=mla" in rest else []
    if "-m" in rest:  # two values of each key are enough
        rest = [word if word.startswith("run.dir=") else ",".join(word.split(",")[:2]) for word in rest]
    return [*python, *rest, *SHRINK, *own_data, *mla]


@pytest.mark.parametrize("words", TRAINING, ids=shlex.join)
def test_training_commands_compose_as_they_stand(words, monkeypatch):
    processes = [word.split("=")[1] for word in words if word.startswith("--nproc_per_node")]
    monkeypatch.setenv("WORLD_SIZE", *processes or ["1"])
    overrides = [word for word in words[words.index("train.py") + 1 :] if "=" in word]
    swept = [o.split("=")[1].split(",") if "-m" in words and "{" not in o else [o.split("=", 1)[1]] for o in overrides]
    for number in range(max(map(len, swept), default=1)):
        chosen = [values[min(number, len(values) - 1)] for values in swept]
        load(compose("train", [f"{o.split('=')[0]}={value}" for o, value in zip(overrides, chosen, strict=True)]))


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_commands_run(checkout, small_data, words):
    run(checkout, shrink(words, small_data))
