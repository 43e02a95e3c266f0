"""Benchmarks inside a job whose processes hold a part of the parameters each."""

import json

import pytest

from eval import run as eval_run
from tests.distributed.helpers import run
from tests.eval.helpers import evaluation

SUITE = ["suite.tasks=[cloze]", "suite.samples=true"]


@pytest.mark.parametrize("more", [[], ["trainer.dtype=bf16", "++deepspeed.config.bf16.enabled=true"]])
def test_a_sharded_models_scores_are_those_of_its_checkpoint(small_run, tmp_path, more):
    asked = ["trainer.benchmark_every=4", "trainer.benchmarks=[builtin_cloze]", "trainer.benchmark_limit=9"]
    asked.append(f"trainer.benchmark_overrides=[{','.join(repr(word) for word in SUITE)}]")
    run([*small_run, *asked, *more, "deepspeed=zero3"], processes=2)
    inside = scores(tmp_path)
    assert eval_run.main(evaluation(f"run={tmp_path}/run", "suite=builtin_cloze", *SUITE, "limit=9")) == 0
    after = scores(tmp_path)
    assert inside.keys() == after.keys() and len(after) == 9
    for question, expected in after.items():
        assert inside[question] == pytest.approx(expected, rel=1e-4 if not more else 1e-2)


def scores(folder) -> dict[str, list[float]]:
    """The log-likelihoods of each question's answers."""
    path = folder / "run/results/builtin_cloze_samples.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return {str(line["doc_id"]): [pair[0] for pair in line["filtered_resps"]] for line in found}
