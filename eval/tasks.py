"""The harness's tasks: found by name, read from the network or from a folder, and our own."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from rich.console import Console

from configs.errors import ConfigError
from configs.load import did_you_mean
from configs.schema_eval import HarnessSuite
from eval import cloze
from eval.loading import LoadedRun

# Where the harness keeps the tasks of our suites: looking only there saves the seconds that its whole index takes.
FOLDERS = {
    "arc_easy": "arc", "arc_challenge": "arc", "boolq": "super_glue/boolq", "hellaswag": "hellaswag",
    "mmlu": "mmlu/default", "openbookqa": "openbookqa", "piqa": "piqa", "sciq": "sciq", "winogrande": "winogrande",
    "wikitext": "wikitext",
}  # fmt: skip
SPLITS = ("train", "validation", "test", "dev")


class LocalTask(ConfigurableTask):
    """A task of the harness whose questions are in a folder, as <task>_<split>.jsonl in the original's columns.

    A group's tasks may be together in <group>_<split>.jsonl, told apart by a column `subject`. Where the split that the
    task is evaluated on is not there, the other of validation and test is; where there are no training questions,
    examples are drawn from the evaluated ones, without the question itself.
    """

    def __init__(self, config: dict):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict | None = None, **kwargs) -> None:
        config = self.config
        named = {config.training_split, config.validation_split, config.test_split, config.fewshot_split} - {None}
        self.dataset = read_folder(Path(dataset_kwargs["data_dir"]), config.task, config.dataset_name, named)
        evaluated = config.test_split or config.validation_split
        evaluated = next(split for split in (evaluated, "validation", "test", *self.dataset) if split in self.dataset)
        examples = (self.fewshot_cfg.split, config.training_split, evaluated)
        config.training_split, config.validation_split, config.test_split = None, None, evaluated
        self.fewshot_cfg.split = next(split for split in examples if split in self.dataset)


def read_folder(folder: Path, task: str, subject: str | None, named: set[str]) -> dict[str, datasets.Dataset]:
    """The questions of a task by split. ConfigError where the folder has none."""
    splits = "|".join(re.escape(split) for split in sorted({*SPLITS, *named}))
    parts = task.split("_")
    for length in range(len(parts), 0, -1):
        stem = "_".join(parts[:length])
        pattern = re.compile(rf"{re.escape(stem)}_({splits})([_.-].*)?\.jsonl")
        rows: dict[str, list] = {}
        for path in sorted(folder.glob(f"{stem}_*.jsonl")):
            if found := pattern.fullmatch(path.name):
                lines = read_lines(path)
                mine = lines if stem == task else [line for line in lines if line.get("subject", "") == subject]
                rows.setdefault(found[1], []).extend(mine)
        if any(rows.values()):
            return {split: datasets.Dataset.from_list(lines) for split, lines in rows.items() if lines}
    raise ConfigError(
        f"suite.data_dir={folder}: has no {task}_<split>.jsonl, the split being one of {splits.replace('|', ', ')}; "
        "suite.prefetch=true writes such files where there is a network"
    )


def read_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON lines ({error})") from None


def load_tasks(suite: HarnessSuite, run: LoadedRun | None) -> list[Task | Group]:
    """The suite's tasks; ours, which are made from a run's data, only where there is a run.

    ConfigError names those that cannot be had.
    """
    ours = [cloze.task(name, run) for name in suite.tasks if name in cloze.TASKS and run is not None]
    others = [name for name in suite.tasks if name not in cloze.TASKS]
    if not others:
        return ours
    manager, errors, found = find_tasks(others), [], []
    known = [*manager.all_tasks, *cloze.TASKS]
    if suite.data_dir and not suite.prefetch and not Path(suite.data_dir).is_dir():
        raise ConfigError(f"suite.data_dir={suite.data_dir}: there is no such folder")
    for name in others:
        if name not in known:
            errors.append(f"suite.tasks: {name}: lm-evaluation-harness has no such task; {did_you_mean(name, known)}")
            continue
        try:
            local = suite.data_dir if not suite.prefetch else None
            found.extend(built(manager, name, local))
        except ConfigError as error:
            errors.extend(error.errors)
        except Exception as error:  # of the hub and the network, in any of their ways
            reason = (str(error) or type(error).__name__).splitlines()[0]
            errors.append(
                f"suite.tasks: {name}: its data cannot be loaded ({reason}); without a network give suite.data_dir="
            )
    if errors:
        raise ConfigError(*errors)
    return [*ours, *found]


def find_tasks(names: list[str]) -> TaskManager:
    """A TaskManager that knows at least these."""
    root = Path(lm_eval.tasks.__file__).parent
    folders = {FOLDERS.get(name) or FOLDERS.get(name.split("_")[0]) for name in names}
    if None not in folders:
        manager = TaskManager(include_path=sorted(str(root / folder) for folder in folders), include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    return TaskManager()


def built(manager: TaskManager, name: str, data_dir: str | None) -> list[Task | Group]:
    """A task, a group or a tag's tasks; with `data_dir` every task in it is a LocalTask."""
    local = {"class": LocalTask, "dataset_kwargs": {"data_dir": str(data_dir)}} if data_dir else None
    # TaskManager.load takes no overrides for a group by name: this is what it calls.
    found = manager._factory.build(manager.task_index[name], overrides=local, registry=manager.task_index)
    return found if isinstance(found, list) else [found]


def leaves(items: list[Task | Group]) -> Iterator[Task]:
    """The single tasks among tasks and groups."""
    for item in items:
        yield from [item] if isinstance(item, Task) else item.get_all_tasks()


def prefetch(suite: HarnessSuite) -> None:
    """Write the questions of the suite's tasks to suite.data_dir, from the network."""
    folder, console = Path(suite.data_dir), Console(highlight=False, soft_wrap=True)
    found = load_tasks(suite, None)
    folder.mkdir(parents=True, exist_ok=True)
    for task in leaves(found):
        config = task.config
        splits = {config.training_split, config.validation_split, config.test_split, config.fewshot_split} - {None}
        for split in sorted(splits & set(task.dataset)):
            path = folder / f"{config.task}_{split}.jsonl"
            rows = task.dataset[split]
            partial = path.with_suffix(".partial")
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            partial.replace(path)
            console.print(f"{path}: {len(rows):,} rows")
