"""Benchmarks inside a job whose processes hold a part of the parameters each."""

import json
from pathlib import Path

import pytest

from eval import run as eval_run
from tests.conftest import SMALL_RUN
from tests.distributed.helpers import run_several
from tests.eval.helpers import evaluation

SUITE = ["suite.tasks=[cloze]", "suite.samples=true"]
PRECISIONS = {"fp32": [], "bf16": ["trainer.dtype=bf16", "++deepspeed.config.bf16.enabled=true"]}


@pytest.fixture(scope="module")
def benchmarked(small_data, tmp_path_factory) -> Path:
    """Return the folder of a run in each precision, trained on two processes with benchmarks."""
    folder = tmp_path_factory.mktemp("benchmarked")
    benchmarks = ["trainer.benchmark_every=4", "trainer.benchmarks=[builtin_cloze]", "trainer.benchmark_limit=9"]
    benchmarks.append(f"trainer.benchmark_overrides=[{','.join(repr(word) for word in SUITE)}]")
    common = [*SMALL_RUN, *small_data, *benchmarks, "deepspeed=zero3"]
    run_several([[*common, *own, f"run.dir={folder}/{name}"] for name, own in PRECISIONS.items()], 2)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sharded_models_scores_are_those_of_its_checkpoint(benchmarked, precision):
    folder = benchmarked / precision
    inside = take_scores(folder)
    assert eval_run.main(evaluation(f"run={folder}", "suite=builtin_cloze", *SUITE, "limit=9")) == 0
    after = take_scores(folder)
    assert inside.keys() == after.keys() and len(after) == 9
    for question, expected in after.items():
        assert inside[question] == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 1e-2)


def take_scores(folder: Path) -> dict[str, list[float]]:
    """Return the log-likelihoods of each question's answers, and delete the file that has them."""
    (path,) = folder.glob("results/builtin_cloze_*_samples.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return {str(line["doc_id"]): [pair[0] for pair in line["filtered_resps"]] for line in found}
