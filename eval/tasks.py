"""The harness's tasks: found by name, read from the network or from a folder, and our own."""

import codecs
import itertools
import json
from pathlib import Path

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from rich.console import Console

from configs.errors import ConfigError, did_you_mean, each
from data.files import write_atomic
from eval import cloze
from eval.loading import LoadedRun

FOLDERS = {"boolq": "super_glue"}  # of the harness, where a task of our suites is in one that is not named like it
SPLITS = ("train", "validation", "test", "dev")


class LocalTask(ConfigurableTask):
    """A task of the harness whose questions are in a folder, as <task>_<split>.jsonl in the original's columns.

    A group's tasks may be together in <group>_<split>.jsonl, told apart by a column `subject`. If the split that the
    task is evaluated on is missing, the other of validation and test is used; if training questions are missing,
    examples are drawn from the evaluated ones, without the question itself.
    """

    def __init__(self, config: dict):
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict | None = None, **kwargs) -> None:
        config = self.config
        self.dataset = read_folder(
            Path(dataset_kwargs["data_dir"]), config.task, config.dataset_name, splits_of(config)
        )
        evaluated = config.test_split or config.validation_split
        evaluated = next(split for split in (evaluated, "validation", "test", *self.dataset) if split in self.dataset)
        examples = (self.fewshot_cfg.split, config.training_split, evaluated)
        config.training_split, config.validation_split, config.test_split = None, None, evaluated
        self.fewshot_cfg.split = next(split for split in examples if split in self.dataset)


def splits_of(config) -> set[str]:
    """Return the splits that a task's configuration names."""
    return {config.training_split, config.validation_split, config.test_split, config.fewshot_split} - {None}


def read_folder(folder: Path, task: str, subject: str | None, named: set[str]) -> dict[str, datasets.Dataset]:
    """Return the questions of a task by split. ConfigError if the folder has none."""
    splits = sorted({*SPLITS, *named})
    for stem in reversed([*itertools.accumulate(task.split("_"), "{}_{}".format)]):  # the task, then its groups
        found = {}
        for split in splits:
            paths = sorted(folder.glob(f"{stem}_{split}[_.-]*jsonl"))  # or parts, as in mmlu_test_tenth.jsonl
            questions = (question for path in paths for question in read_questions(path))
            own = [question for question in questions if stem == task or question.get("subject", "") == subject]
            if own:
                found[split] = datasets.Dataset.from_list(own)
        if found:
            return found
    raise ConfigError(
        f"suite.data_dir={folder}: has no {task}_<split>.jsonl, the split being one of {', '.join(splits)}; "
        "suite.prefetch=true writes such files on a machine with a network"
    )


def read_questions(path: Path) -> list[dict]:
    """Return the questions of a file of JSON lines. ConfigError that names the line if one is none."""
    questions = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        try:
            question = json.loads(line.decode()) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: line {number} is not JSON in UTF-8 ({error})") from None
        if question is not None and not isinstance(question, dict):
            raise ConfigError(f"{path}: line {number} is not an object with a question's columns")
        questions += [question] if question else []
    return questions


def load_tasks(names: list[str], data_dir: str | None, run: LoadedRun | None = None) -> list[Task | Group]:
    """Return the tasks `names`; ours, which are made from a run's data, only if there is a run.

    Their questions come from `data_dir`, or without one from the network. ConfigError names all that are unavailable.
    """
    ours = [cloze.task(name, run) for name in names if name in cloze.TASKS and run is not None]
    others = [name for name in names if name not in cloze.TASKS]
    if data_dir and not Path(data_dir).is_dir():
        raise ConfigError(f"suite.data_dir={data_dir}: there is no such folder")
    manager = find_tasks(others)
    found = each(lambda name: load_task(manager, name, data_dir), others)
    return [*ours, *(task for tasks in found for task in tasks)]


def find_tasks(names: list[str]) -> TaskManager:
    """Return a TaskManager that knows at least these.

    Looking only in folders that are named like them saves the seconds that the harness's whole index takes. A tag's
    tasks may be in any folder.
    """
    named = [FOLDERS.get(name, name) for name in names]
    folders = [path for path in Path(lm_eval.tasks.__file__).parent.iterdir() if path.is_dir()]
    likely = [str(path) for path in folders if any(name.startswith(path.name) for name in named)]
    manager = TaskManager(include_path=sorted(likely), include_defaults=False)
    return manager if {*manager.all_subtasks, *manager.all_groups}.issuperset(names) else TaskManager()


def load_task(manager: TaskManager, name: str, data_dir: str | None) -> list[Task | Group]:
    """Return a task, a group or a tag's tasks; with `data_dir` every task in it is a LocalTask."""
    known = [*manager.all_tasks, *cloze.TASKS]
    if name not in known:
        raise ConfigError(f"suite.tasks: {name}: lm-evaluation-harness has no such task; {did_you_mean(name, known)}")
    local = {"class": LocalTask, "dataset_kwargs": {"data_dir": str(data_dir)}} if data_dir else None
    try:
        # TaskManager.load takes no overrides for a group by name: this is what it calls.
        found = manager._factory.build(manager.task_index[name], overrides=local, registry=manager.task_index)
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub and the network raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"suite.tasks: {name}: its data cannot be loaded ({reason}); without a network give suite.data_dir="
        ) from error
    return found if isinstance(found, list) else [found]


def download(names: list[str], data_dir: str) -> None:
    """Write the questions of the tasks `names` to `data_dir`, from the network."""
    folder, console = Path(data_dir), Console(highlight=False, soft_wrap=True)
    found = load_tasks(names, data_dir=None)
    folder.mkdir(parents=True, exist_ok=True)
    for task in TaskManager(include_defaults=False).load(found)["tasks"].values():
        for split in sorted(splits_of(task.config) & set(task.dataset)):
            path, rows = folder / f"{task.config.task}_{split}.jsonl", task.dataset[split]
            write_atomic(path, (json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n" for row in rows))
            console.print(f"{path}: {len(rows):,} rows")
