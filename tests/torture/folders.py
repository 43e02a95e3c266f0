"""Damage folders and fill them with hostile content: `python -m tests.torture.folders [NAME ...]`

Each row of DAMAGES spoils a copy of a run folder, or of its data, and then every command opens it. A command has to do
its work, or end with one message (ConfigError, or the run's own end). No command may run code that a folder names,
touch what lies outside of the folder, lose another run's row, or lose a line of metrics. Exit with 1 if one does.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

import train
from configs.app import as_yaml, configured
from configs.block import to_dict
from configs.errors import ConfigError
from data import inspect
from data.config import DataCommand
from data.prepare import prepare
from eval import run as eval_run
from eval import sample
from eval.compare import __main__ as compare
from eval.config import EvalConfig
from slurm import status
from tests.conftest import SMALL_RUN, prepare_small_data
from training.config import Config

PAYLOAD = """
import os, pathlib
pathlib.Path(os.environ["T6_TORTURE_MARK"]).touch()
from model.attention.multi_head import MultiHeadConfig
class Payload(MultiHeadConfig):
    pass
"""
HTML = "<script>alert(1)</script> [red]x[/red] | ![a](/etc/hostname.png)"


def config_with(**blocks) -> Callable[[Path], None]:
    """Return what merges keys into config.yaml."""

    def act(run: Path) -> None:
        tree = yaml.safe_load((run / "config.yaml").read_text())
        for block, keys in blocks.items():
            tree[block] = tree[block] | keys if isinstance(keys, dict) else keys
        (run / "config.yaml").write_text(as_yaml(tree))

    return act


def content(name: str, what: str | bytes) -> Callable[[Path], None]:
    """Return what puts `what` in place of the file `name`."""

    def act(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(what if isinstance(what, bytes) else what.encode())

    return act


def added(name: str, what: str | bytes) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        with open(folder / name, "ab") as file:
            file.write(what if isinstance(what, bytes) else what.encode())

    return act


def missing(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for path in folder.glob(name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    return act


def folder_instead(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir(parents=True)

    return act


def link_instead(name: str, to: str) -> Callable[[Path], None]:
    """Return what puts a link in place of `name`; OUTSIDE in `to` is a folder that must stay as it is."""

    def act(folder: Path) -> None:
        missing(name)(folder)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(to.replace("OUTSIDE", str(folder.parent / "outside")))

    return act


def flipped(name: str) -> Callable[[Path], None]:
    """Return what flips a bit in the middle of each file of that name."""

    def act(folder: Path) -> None:
        for path in folder.glob(name):
            found = bytearray(path.read_bytes())
            found[len(found) // 2] ^= 1
            path.write_bytes(found)

    return act


def cut(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for path in folder.glob(name):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return act


CHECKPOINT = "checkpoints/step_00000004"
GARBAGE = b"\x00\xff\xfe{[\n" * 50
PICKLED = b"\x93NUMPY\x01\x00F\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + b" " * 9 + b"\n"
PICKLED += b"cos\nsystem\n(S'touch hostile'\ntR."
RECORD = {"suite": "perplexity", "step": 4, "results": {"loss": 5.0}}
RUN: dict[str, Callable[[Path], None]] = {
    "config: missing": missing("config.yaml"),
    "config: empty": content("config.yaml", ""),
    "config: a list": content("config.yaml", "[1, 2]"),
    "config: torn": cut("config.yaml"),
    "config: binary": content("config.yaml", GARBAGE),
    "config: a folder": folder_instead("config.yaml"),
    "config: a dangling link": link_instead("config.yaml", "nowhere"),
    "config: nested without end": content("config.yaml", "[" * 100_000),
    "config: aliases": content("config.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    "config: another class": config_with(model={"_target_": "t6_torture_payload.Payload"}),
    "config: a function": config_with(model={"_target_": "os.system"}),
    "config: a Python object": content("config.yaml", "!!python/object/apply:os.system ['touch hostile']"),
    "config: a resolver": config_with(run={"name": "${oc.env:HOME}"}),
    "config: unknown keys": config_with(run={"surprise": 1}),
    "config: wrong types": config_with(trainer={"max_steps": "many"}, size={"n_layers": {}}),
    "config: huge numbers": config_with(size={"n_layers": 10**12}),
    "config: a name of HTML": config_with(run={"name": HTML}),
    "config: a name of two lines": config_with(run={"name": "a\nb"}),
    "config: other data": config_with(data={"dir": "/nowhere"}),
    "metrics: missing": missing("metrics.jsonl"),
    "metrics: a torn line": added("metrics.jsonl", '{"step": 9, "tok'),
    "metrics: no objects": added("metrics.jsonl", '1\n"x"\n[]\nnull\n'),
    "metrics: wrong types": added("metrics.jsonl", '{"step": "x", "tokens": []}\n{"step": 1, "tokens": 1, "a": {}}\n'),
    "metrics: NUL": added("metrics.jsonl", b"\x00" * 5000),
    "metrics: binary": added("metrics.jsonl", GARBAGE),
    "metrics: a huge number": added("metrics.jsonl", '{"step": 3, "tokens": 1e400, "val/loss": 1e400}\n'),
    "events: binary": content("events.jsonl", GARBAGE),
    "events: no keys": content("events.jsonl", '{"a": 1}\n{"event": 5, "step": "x"}\n{"event": "rollback"}\n'),
    "checkpoints: missing": missing("checkpoints"),
    "checkpoints: a dangling link": link_instead("checkpoints", "nowhere"),
    "checkpoints: a loop of links": link_instead("checkpoints", "checkpoints"),
    "checkpoints: a file": lambda run: (missing("checkpoints")(run), content("checkpoints", "x")(run)),
    "checkpoints: strangers": lambda run: [
        content(f"checkpoints/{name}", "mine")(run) for name in ("step_note.txt", "step_backup/mine", "step_1/x", "y/z")
    ],
    "checkpoint: no manifest": missing(f"{CHECKPOINT}/manifest.json"),
    "checkpoint: a manifest that is a list": content(f"{CHECKPOINT}/manifest.json", "[]"),
    "checkpoint: a manifest without keys": content(f"{CHECKPOINT}/manifest.json", "{}"),
    "checkpoint: a binary manifest": content(f"{CHECKPOINT}/manifest.json", GARBAGE),
    "checkpoint: a flipped manifest": flipped(f"{CHECKPOINT}/manifest.json"),
    "checkpoint: flipped weights": flipped(f"{CHECKPOINT}/model.safetensors"),
    "checkpoint: torn weights": cut(f"{CHECKPOINT}/model.safetensors"),
    "checkpoint: torn optimizer": cut(f"{CHECKPOINT}/optimizer.safetensors"),
    "checkpoint: weights elsewhere": link_instead(f"{CHECKPOINT}/model.safetensors", "OUTSIDE/secret"),
    "checkpoint: a link out": link_instead("checkpoints/step_00000009", "OUTSIDE"),
    "latest: missing": missing("latest"),
    "latest: a path": content("latest", "../../outside"),
    "summary: a folder": folder_instead("summary.json"),
    "results: binary": content("results/perplexity.json", GARBAGE),
    "results: a list": content("results/perplexity.json", "[]"),
    "results: no numbers": content("results/x.json", json.dumps(RECORD | {"results": {"loss": "low", "a": [1]}})),
    "results: wrong keys": content("results/x.json", json.dumps(RECORD | {"metrics": [], "stderr": 3, "limit": "x"})),
    "results: HTML": content("results/<script>.json", json.dumps(RECORD | {"metrics": {HTML: HTML}})),
    "results: a folder": folder_instead("results/x.json"),
    "results: a link out": link_instead("results/x.json", "OUTSIDE/secret"),
    "results: a link to write through": link_instead("results/perplexity_limit=1.json", "OUTSIDE/secret"),
    "results: decoding": content("results/decoding.jsonl", '{"model": "mha"}\n[]\n'),
    "results: an inbox of strangers": content("results/inbox/x_step_00000004.json", "[]"),
    "tokenizer: binary": content("tokenizer.model", GARBAGE),
    "tokenizer: missing": missing("tokenizer.model"),
    "jobs: binary": content("job.json", GARBAGE),
    "jobs: a list": content("job.json", '{"jobs": []}'),
    "logs: markup": content("slurm-7.log", b"=== job 7: failed [red]x[/] [\n\xff\x00 Error: [/bold]\n"),
    "wandb: binary": lambda run: [content(f"wandb/{name}", GARBAGE)(run) for name in ("id", "rows.jsonl")],
    "lock: a folder": folder_instead(".lock"),
}
DATA: dict[str, Callable[[Path], None]] = {
    "data: no manifest": missing("manifest.json"),
    "data: a binary manifest": content("manifest.json", GARBAGE),
    "data: an edited manifest": lambda data: content(
        "manifest.json", (data / "manifest.json").read_text().replace('"name": "files"', '"name": "other"')
    )(data),
    "data: a shard elsewhere": lambda data: content(
        "manifest.json", (data / "manifest.json").read_text().replace("train_000000.bin", "../outside/secret")
    )(data),
    "data: flipped shards": flipped("train_*.bin"),
    "data: torn shards": cut("train_*.bin"),
    "data: missing shards": missing("val_*.bin"),
    "data: binary indexes": content("train_000000.index.npy", GARBAGE),
    "data: pickled indexes": content("train_000000.index.npy", PICKLED),
    "data: binary tokenizer": content("tokenizer.model", GARBAGE),
    "data: a folder for a shard": folder_instead("val_000000.bin"),
}  # fmt: skip


def commands(run: Path, data: Path, texts: str) -> dict[str, Callable[[], object]]:
    """Return what opens a run folder, or its data, by the name of the command."""
    out, options = run.parent.with_name("out"), ["device=cpu", f"run={run}"]
    ours = [texts, f"data.dir={data}", "data=files", "tokenizer.vocab_size=512"]

    def prepares() -> None:
        command = configured(DataCommand, ours)
        prepare(command.data, command.tokenizer, progress=False)

    return {
        "slurm.status": lambda: status.main([str(run.parent)]),
        "eval.compare": lambda: compare.main(compare.parse([str(run.parent), f"out={out}"]), ""),
        "eval.sample": lambda: sample.main(configured(sample.SampleConfig, [*options, "max_new_tokens=2"])),
        "eval.run": lambda: eval_run.main(configured(EvalConfig, [*options, "limit=1"])),
        "data.inspect": lambda: inspect.main(configured(inspect.InspectConfig, [*ours, f"out={out}/lengths.png"])),
        "data.prepare": prepares,
        "train.py": lambda: train.main(configured(Config, overrides(run, data, texts))),
    }


def overrides(run: Path, data: Path, texts: str) -> list[str]:
    return [*SMALL_RUN, texts, f"data.dir={data}", "model=mha", "trainer.samples=0", "trainer.eval_batches=1",
            f"run.dir={run}"]  # fmt: skip


def lines_of(run: Path) -> int:
    """Return how many whole lines of metrics a run has up to the step of its checkpoint."""
    path, count = run / "metrics.jsonl", 0
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        with contextlib.suppress(ValueError):
            count += isinstance(found := json.loads(line), dict) and found.get("step") in (1, 2, 3, 4)
    return count


def attempt(name: str, act: Callable[[Path], None], whole: Path, folder: Path) -> list[str]:
    """Return what went wrong when every command has opened a damaged copy of `whole`, a line each."""
    folder.mkdir()
    for part in ("runs", "data", "outside"):
        shutil.copytree(whole / part, folder / part, symlinks=True)
    run, data, outside = folder / "runs/bad", folder / "data", folder / "outside"
    for config in folder.glob("runs/*/config.yaml"):
        tree = yaml.safe_load(config.read_text())
        tree["data"]["dir"], tree["run"]["dir"] = str(data), str(config.parent)
        config.write_text(as_yaml(tree))
    (run.parent / "outside").symlink_to(outside)  # what links in RUN point to
    is_data = name in DATA
    act(data if is_data else run)
    wrong, before = [], lines_of(run)
    for command, call in commands(run, data, f"data.files=[{whole}/*.txt]").items():
        shown = io.StringIO()
        try:
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
                call()
        except (ConfigError, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code not in (1, 2, 75):
                wrong.append(f"{command}: ended with {error.code}")
        except BaseException as error:
            wrong.append(f"{command}: {type(error).__name__}: {str(error)[:200]}")
        report = folder / "out/report.md"
        said = report.read_text() if command == "eval.compare" and report.exists() else shown.getvalue()
        if command in ("slurm.status", "eval.compare") and "good" not in said:
            wrong.append(f"{command}: the other run is not shown")
        if (outside / "secret").read_bytes() != b"secret" or sorted(os.listdir(outside)) != ["secret"]:
            wrong.append(f"{command}: has touched what lies outside")
        if lines_of(run) < before and "checkpoint" not in name:
            wrong.append(f"{command}: has lost lines of metrics")
    for page in folder.glob("out/report.html"):
        if "<script" in page.read_text() or "cm9vdA" in page.read_text():
            wrong.append("eval.compare: the report has a script, or another file")
    if "strangers" in name and not (run / "checkpoints/step_backup/mine").exists() and "checkpoints" in name:
        wrong.append("train.py: has deleted what is not its own")
    return wrong


def make_whole(folder: Path) -> None:
    """Make an unfinished run and a finished one, their data, and a folder that nobody may touch."""
    folder.mkdir()
    texts, _ = prepare_small_data(folder)
    (folder / "shards").rename(folder / "data")
    (folder / "outside").mkdir()
    (folder / "outside/secret").write_bytes(b"secret")
    for name in ("good", "bad"):
        options = [*overrides(folder / f"runs/{name}", folder / "data", texts.replace("'", "")), f"run.name={name}"]
        config = configured(Config, options)
        assert train.main(config) == 0, to_dict(config)
    shutil.rmtree(folder / "runs/bad/checkpoints/step_00000008")
    (folder / "runs/bad/summary.json").unlink()
    (folder / "runs/bad/latest").write_text("step_00000004")


def main(chosen: list[str]) -> int:
    damages = {name: act for name, act in (RUN | DATA).items() if not chosen or any(word in name for word in chosen)}
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "lib").mkdir()
        (root / "lib/t6_torture_payload.py").write_text(PAYLOAD)
        sys.path.insert(0, str(root / "lib"))
        os.environ["T6_TORTURE_MARK"] = str(root / "code_has_run")
        here = os.getcwd()
        (root / "cwd").mkdir()
        os.chdir(root / "cwd")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                make_whole(root / "whole")
            for number, (damage, act) in enumerate(damages.items()):
                wrong = attempt(damage, act, root / "whole", root / str(number))
                wrong += ["code of the folder has run"] if (root / "code_has_run").exists() else []
                wrong += [f"something is left behind: {left}" for left in os.listdir(root / "cwd")]
                print(f"{'held' if not wrong else 'FAILED':<6} {damage}", *wrong, sep="\n       ", flush=True)
                failed += bool(wrong)
                shutil.rmtree(root / str(number))
        finally:
            os.chdir(here)
            sys.path.remove(str(root / "lib"))
    print(f"{len(damages) - failed} of {len(damages)} held")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
