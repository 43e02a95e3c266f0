"""A run in W&B: a view of its folder that may fail at any time without harm.

A run folder has one W&B run, whatever the number of requeues and evaluations: its id is a function of the folder, and
it is filled from metrics.jsonl. What a killed process logged but W&B lost is sent by the next one; what W&B has already
is not sent again, so that steps which are trained a second time keep the values of the first. While a run trains, the
training process alone writes to W&B, and passes on what evaluations add to metrics.jsonl; then evaluations do it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from configs.schema import Config, flatten, to_dict
from data.shards import MANIFEST_FILE, read_manifest
from model import counting
from model.transformer import TransformerConfig
from training.wandb_files import mend, read_records, run_id, wandb_files

ROOT = Path(__file__).parent.parent
SOURCES = ("*.py", "*.txt", "configs", "data", "eval", "model", "training")  # what of the repository a run keeps

# What W&B's summary keeps of a metric beside its last value; benchmarks (eval/...) are shown as they are.
SUMMARIES = {
    "train/loss": "min,last",
    "val/loss": "min,last",
    "val/perplexity": "min,last",
    "val/bits_per_byte": "min,last",
    "optim/grad_norm": "max,last",
    "perf/tokens_per_second": "mean,max,last",
    "perf/mfu": "mean,max,last",
    "perf/memory_gb": "max",
}


def wandb_mode(mode: str) -> str:
    """`auto` is online where somebody is logged in (WANDB_API_KEY or a netrc entry), else offline."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import netrc

    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
        logged_in = netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        logged_in = False
    return "online" if logged_in or os.environ.get("WANDB_API_KEY") else "offline"


def flat(tree: dict) -> dict:
    """A configuration as W&B can search it: flat, and without dots, which W&B takes for nesting."""
    return {key.replace(".", "/"): value for key, value in flatten(tree).items()}


def group_of(config: Config) -> str | None:
    """The experiment: `wandb.group`, or the folder that a sweep's run folders lie in."""
    parent = Path(config.run.dir).absolute().parent.name
    return config.wandb.group or (parent if parent != "runs" else None)


def open_run(config: Config, folder: Path, job_type: str, name: str, id: str, settings: dict):
    """`wandb.init` as every run here does it; None where W&B is disabled or cannot start."""
    mode = wandb_mode(config.wandb.mode)
    if mode == "disabled":
        return None
    about = [config.data.name] if job_type == "prepare" else [config.model.name, config.size.name]
    try:
        import wandb

        return wandb.init(
            project=config.wandb.project,
            group=group_of(config),
            job_type=job_type,
            tags=[*about, *config.wandb.tags],
            name=name,
            id=id,
            resume="allow",  # also offline: `wandb sync` then appends a requeue's file to the run
            dir=str(folder),
            mode=mode,
            reinit="finish_previous",  # a run of this process whose dashboard failed is not to be joined
            config=settings,
            settings=wandb.Settings(silent=True, init_timeout=60),
        )
    except Exception as error:
        print(f"W&B could not start ({error}); metrics.jsonl has everything")
        return None


class WandbRun:
    """The W&B run of a run folder. Every method does nothing once W&B has failed (or is disabled)."""

    def __init__(self, config: Config, tree: dict):
        self.run_dir = Path(config.run.dir)
        self.known: dict[tuple[int, str], float | None] = {}  # (step, metric) that W&B has
        self.file, self.read_bytes = None, 0  # which metrics.jsonl, and how much of it was sent
        self.run = None
        if wandb_mode(config.wandb.mode) != "disabled":
            self._recall()
            self.run = open_run(config, self.run_dir, "train", config.run.name, run_id(self.run_dir), flat(tree))
            self._try(lambda run: self._begin(run, config))

    def _recall(self) -> None:
        """Read what W&B has of the processes before, and mend what a killed one left."""
        for path in wandb_files(self.run_dir):
            try:
                mend(path)
                if not path.exists():
                    continue
                items = [record["history"]["item"] for record in read_records(path) if record["type"] == "history"]
            except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
                print(f"{path}: cannot be read ({error}); W&B may show its steps twice")
                continue
            for item in items:
                self.known |= {(item.get("step"), key): value for key, value in item.items()}

    def _begin(self, run, config: Config) -> None:
        run.define_metric("tokens", summary="max")
        run.define_metric("step", summary="max")
        run.define_metric("*", step_metric="tokens")
        for key, summary in SUMMARIES.items():
            run.define_metric(key, step_metric="tokens", summary=summary)
        network = TransformerConfig.from_config(config)
        run.summary.update(counting.summary(network, config.trainer.seq_len) | fingerprints(Path(config.data.dir)))
        if not self.known:
            save_sources(run, self.run_dir)
        self.catch_up()

    def catch_up(self) -> None:
        """Send what metrics.jsonl has and W&B has not."""
        self._try(self._catch_up)

    def _catch_up(self, run) -> None:
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return
        with open(path, "rb") as file:
            if (which := os.fstat(file.fileno()).st_ino) != self.file:  # the first one, or lines were dropped
                self.file, self.read_bytes = which, 0
            file.seek(self.read_bytes)
            whole, end, _ = file.read().rpartition(b"\n")
        self.read_bytes += len(whole + end)
        for text in whole.splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # torn by a killed process
            step, tokens = line.pop("step"), line.pop("tokens")
            news = {key: value for key, value in line.items() if not self._has(step, key, value)}
            if news:
                run.log({"step": step, "tokens": tokens} | news)
                self.known |= {(step, key): value for key, value in news.items()}

    def _has(self, step: int, key: str, value: float | None) -> bool:
        """An evaluation may be repeated with another result; a training step that was gone back over is not."""
        there = (step, key) in self.known
        return there and (not key.startswith("eval/") or self.known[step, key] == value)

    def summarize(self, facts: dict) -> None:
        """Facts beside the metrics, whose summary W&B makes itself."""
        self.note({key: v for key, v in facts.items() if "/" not in key and key not in ("step", "tokens", "run")})

    def note(self, facts: dict) -> None:
        self._try(lambda run: run.summary.update(facts))

    def show_texts(self, key: str, texts: list[str]) -> None:
        """Texts as a table, one a row."""
        self._try(lambda run: run.log({key: table(["sample", "text"], list(enumerate(texts, 1)))}))

    def show_images(self, paths: list[Path]) -> None:
        self._try(lambda run: run.log(images(paths)))

    def finish(self, exit_code: int = 0) -> None:
        self.catch_up()
        self._try(lambda run: run.finish(exit_code=exit_code))
        self.run = None

    def _try(self, action) -> None:
        if self.run is None:
            return
        try:
            action(self.run)
        except Exception as error:  # a dashboard is no reason to stop training
            print(f"W&B failed and is off from here on (metrics.jsonl goes on): {error}")
            self.run = None


def fingerprints(data_dir: Path) -> dict[str, str]:
    """Of the data that a run is trained on, and its tokenizer."""
    if not (data_dir / MANIFEST_FILE).exists():
        return {}
    manifest = read_manifest(data_dir)
    return {
        "data_fingerprint": manifest.fingerprint,
        "tokenizer_fingerprint": manifest.tokenizer.get("fingerprint", ""),
    }


def save_sources(run, run_dir: Path) -> None:
    """Copies of the code and of the run's config.yaml, in the W&B run's own folder, so that a later sync has them."""
    for pattern in SOURCES:
        for found in ROOT.glob(pattern):
            for path in [found] if found.is_file() else [p for s in ("py", "yaml") for p in found.rglob(f"*.{s}")]:
                to = Path(run.dir) / "code" / path.relative_to(ROOT)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, to)
    if (run_dir / "config.yaml").exists():
        shutil.copyfile(run_dir / "config.yaml", Path(run.dir) / "code" / "run_config.yaml")
    for depth in ("*", "*/*", "*/*/*", "*/*/*/*"):
        if any(path.is_file() for path in (Path(run.dir) / "code").glob(depth)):
            run.save(f"{run.dir}/code/{depth}", base_path=run.dir, policy="now")


def table(columns: list[str], rows: list):
    import wandb

    return wandb.Table(columns=columns, data=[list(row) for row in rows])


def images(paths: list[Path]) -> dict:
    import wandb

    return {f"plots/{path.stem}": wandb.Image(str(path)) for path in paths}


def log_job(config: Config, folder: Path, job_type: str, name: str, facts: dict, settings: dict, plots=()) -> None:
    """A short job beside training (an evaluation, a preparation) as a W&B run of its own, with its facts as summary."""
    run = open_run(config, folder, job_type, name, run_id(folder, job_type, name), settings)
    if run is None:
        return
    try:
        run.summary.update(facts)
        if plots:
            run.log(images(list(plots)))
        run.finish()
    except Exception as error:
        print(f"W&B failed: {error}")


def log_evaluation(run_dir: Path, suite: str, record: dict, plots: list[Path]) -> None:
    """Show an evaluation: as a job of its own, and, once training is done, in its run, from metrics.jsonl's new line.

    `record` is what results/<suite>.json holds. The process of a run that still trains shows the line itself.
    """
    from training.run_folder import read_config  # which logs through here

    config = read_config(run_dir)
    tree, config.run.dir = to_dict(config), str(run_dir)
    spread = {f"{key}_stderr": value for key, value in record.get("stderr", {}).items()}
    facts = {f"eval/{suite}/{key}": value for key, value in (record["results"] | spread).items()}
    settings = {key: record.get(key) for key in ("run", "suite", "step", "tokens", "limit", "versions")}
    log_job(config, run_dir, "eval", f"{config.run.name} {suite}", facts, settings, plots)
    if (run_dir / "summary.json").exists():
        view = WandbRun(config, tree)
        if plots:
            view.show_images(plots)
        view.finish()


def log_preparation(config: Config, manifest) -> None:
    """Show prepared data where somebody is logged in; offline only by `wandb.mode=offline`, as no run is here yet."""
    if config.wandb.mode == "auto" and wandb_mode("auto") != "online":
        return
    facts = {f"data/{split}/{what}": getattr(manifest, what)(split)
             for split in ("train", "val") for what in ("tokens", "documents")}  # fmt: skip
    facts |= {"data/unigram_entropy": manifest.unigram_entropy, "data/fingerprint": manifest.fingerprint}
    log_job(config, Path(config.data.dir), "prepare", f"prepare {config.data.name}", facts, flat(manifest.settings))
