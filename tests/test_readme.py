"""Every command of README.md works as written: it is composed as it stands, then run, on a small scale.

A command is a line of a ```bash fence. An HTML comment directly before the fence, which readers do not see, tells how
the fence is tested: one line for all commands of the fence, or a line for each command in their order.

    <!-- test: with SMALL DATA -->             <!-- test:
    ```bash                                    as written
    python train.py model=t6                   with limit=4
    ```                                        -->

- `as written`: the command is run as it stands. This is how a fence of README.md without a comment is tested.
- `with WORDS`: it is run with WORDS: `KEY=VALUE` (or `--OPTION=VALUE`) replaces the command's value of that key; all
  others are added at the end. `make` gets `with -n`, `slurm.submit` gets `with --dry-run ...`. Some words are sets:
  SMALL is a model of two layers and 8 steps on a CPU, DATA a small corpus that is prepared already, MLA the ranks that
  fit SMALL. The project's own commands then run in the test's process, which has imported what takes longest.
- `compose`: its configuration is printed with `--cfg job`, of `sbatch` that of the script's command. This is for what
  needs a GPU, a network or a cluster.

Commands run in a copy of the tracked files that also has a trained `runs/first`, `corpus/*.jsonl` and `.venv`, those of
a fence one after the other in one test. Fences of docs/*.md are tested if such a comment precedes them.
"""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

from configs.app import combinations, configured
from tests.conftest import ROOT, SMALL_MLA, SMALL_RUN
from training.config import Config

FENCE = re.compile(r"(?:<!-- test:(?P<how>(?:(?!-->).)*)-->\s*)?^```bash\n(?P<body>.*?)^```", re.DOTALL | re.MULTILINE)
SECONDS = 600  # for one command on a busy machine
GPUS = 8  # of a node, if an sbatch or slurm.submit command does not say


@dataclass
class Command:
    line: str
    how: str  # as written, with WORDS, compose

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


@dataclass
class Fence:
    name: str
    commands: list[Command]


def read_fences(path: Path) -> list[Fence]:
    """Return the fences of a Markdown file that are tested. ValueError for a comment that cannot be understood."""
    text, fences, comments = path.read_text(), [], 0
    for match in FENCE.finditer(text):
        comments += match["how"] is not None
        if match["how"] is None and path.name != "README.md":
            continue
        name = f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start('body')) + 1}"
        lines = match["body"].replace("\\\n", " ").splitlines()
        lines = [line for line in lines if shlex.split(line, comments=True)]
        hows = [how.strip() for how in (match["how"] or "as written").strip().splitlines()]
        if len(hows) == 1:
            hows *= len(lines)
        if len(hows) != len(lines):
            raise ValueError(f"{name}: the comment has {len(hows)} lines, the fence {len(lines)} commands")
        wrong = [how for how in hows if how not in ("as written", "compose") and not how.startswith("with ")]
        if wrong:
            raise ValueError(f"{name}: {wrong[0]!r} must be `as written`, `with WORDS` or `compose`")
        fences.append(Fence(name, [Command(line, how) for line, how in zip(lines, hows, strict=True)]))
    if comments != text.count("<!-- test"):
        raise ValueError(f"{path}: a comment that begins with `<!-- test` is not directly before a ```bash fence")
    return fences


FENCES = [fence for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) for fence in read_fences(path)]


def key_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def shrunk(words: list[str], changes: list[str], sets: dict[str, list[str]]) -> list[str]:
    """Return a command with the words of `with`: those with the key of one of the command's take its place."""
    changes = [each for word in changes for each in sets.get(word, [word])]
    new = {key_of(word): word for word in changes if "=" in word}
    kept = [new.pop(key_of(word), word) if "=" in word else word for word in words]
    return [*kept, *new.values(), *(word for word in changes if "=" not in word)]


def composing(words: list[str]) -> list[str]:
    """Return the command that prints the configuration of `words`."""
    if words[0] == "sbatch":
        script = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
        launched = re.search(r'"\$PYTHON" (?:-P (-m \S+)|"\$code/(\S+)")', (ROOT / words[script]).read_text())
        words = ["python", *(launched[1] or launched[2]).split(), *words[script + 1 :]]
    elif words[0] == "torchrun":
        words = ["python", *(word for word in words[1:] if not word.startswith("--nproc_per_node"))]
    return [*words, "--cfg", "job"]


def training(words: list[str]) -> tuple[list[str], int] | None:
    """Return (the overrides, the number of processes) of a command that trains, or that submits training."""
    if not {"train.py", "slurm.submit", "slurm/train.sbatch"} & set(words):
        return None
    options = {key_of(word): word.partition("=")[2] for word in words if word.startswith("--") and "=" in word}
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    if "train.py" in words:
        return overrides, int(options.get("--nproc_per_node", 1))
    return overrides, int(options.get("--nodes", 1)) * int(options.get("--ntasks-per-node", GPUS))


TRAINING = [command for fence in FENCES for command in fence.commands if training(command.words)]


@pytest.fixture(scope="module")
def sets(small_data) -> dict[str, list[str]]:
    own_data = ("data=", "tokenizer.")
    return {
        "SMALL": [word for word in SMALL_RUN if not word.startswith(own_data)],
        "DATA": ["tokenizer=sentencepiece", *(word for word in SMALL_RUN if word.startswith(own_data)), *small_data],
        "MLA": SMALL_MLA,
    }


@pytest.fixture(scope="module")
def checkout(small_data, sets, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "t6"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "corpus").mkdir()
    texts = Path(small_data[1].removeprefix("data.dir=")).parent.glob("*.txt")
    lines = [json.dumps({"text": path.read_text()}) for path in sorted(texts)]
    (folder / "corpus/a.jsonl").write_text("\n".join(lines) + "\n")
    run(folder, shlex.join(["python", "train.py", "run.name=first", *sets["SMALL"], *sets["DATA"]]))
    return folder


def run(folder: Path, line: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def run_here(folder: Path, words: list[str]) -> None:
    """Run `python [-m] PROGRAM ...` in this process."""
    is_module = words[1] == "-m"
    program, *arguments = words[1 + is_module :]
    with contextlib.chdir(folder), patch.object(sys, "argv", [program, *arguments]):
        try:
            if is_module:
                runpy.run_module(program, run_name="__main__")
            else:
                runpy.run_path(program, run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, shlex.join(words)


@pytest.mark.parametrize("command", TRAINING, ids=lambda command: command.line)
def test_training_commands_compose_as_they_stand(command):
    overrides, processes = training(command.words)
    for combination in combinations(overrides, Config) if "-m" in command.words else [overrides]:
        configured(Config, combination, world_size=processes)


@pytest.mark.parametrize("fence", FENCES, ids=lambda fence: fence.name)
def test_commands_run(fence, checkout, sets):
    for command in fence.commands:
        how, *changes = command.how.split()
        if how == "compose":
            run_here(checkout, composing(command.words))
        elif how == "with" and re.match(r"python (train.py|-m (data|eval|slurm)\.)", command.line):
            run_here(checkout, shrunk(command.words, changes, sets))
        elif how == "with":
            run(checkout, shlex.join(shrunk(command.words, changes, sets)))
        else:
            run(checkout, command.line)


def test_a_comment_that_cannot_be_understood_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "guide.md"

    def fences(text: str) -> list[Fence]:
        path.write_text(text)
        return read_fences(path)

    fence = "```bash\nls  # what is here\n\n# nothing\nls \\\n  -l\n```\n"
    assert fences(fence) == []
    assert [command.words for command in fences(f"<!-- test: as written -->\n{fence}")[0].commands] == [
        ["ls"],
        ["ls", "-l"],
    ]
    assert [c.how for c in fences(f"<!-- test:\nwith -a\ncompose\n-->\n\n{fence}")[0].commands] == [
        "with -a",
        "compose",
    ]
    with pytest.raises(ValueError, match="guide.md:5: the comment has 3 lines, the fence 2 commands"):
        fences(f"<!-- test:\ncompose\ncompose\ncompose -->\n{fence}".replace("test:\n", "test: ", 1))
    with pytest.raises(ValueError, match="'skip' must be `as written`"):
        fences(f"<!-- test: skip -->\n{fence}")
    with pytest.raises(ValueError, match="not directly before"):
        fences(f"<!-- test: as written -->\nText.\n{fence}")
    assert shrunk(["run", "++a=1", "b=2"], ["a=[3]", "-n", "MORE"], {"MORE": ["c=4"]}) == [
        "run",
        "a=[3]",
        "b=2",
        "c=4",
        "-n",
    ]
