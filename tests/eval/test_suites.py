"""Suites of benchmarks: that the scoring can tell, local files in place of a network, and the paper's table."""

import copy
import json
import os
import random
import subprocess
import sys

import pytest
import torch

from configs.errors import ConfigError
from eval import cloze, published
from eval import run as eval_run
from eval.config import question as name_of
from eval.harness import HarnessModel
from eval.loading import LoadedRun
from eval.tasks import find_tasks, load_tasks, read_questions
from tests.conftest import ROOT
from tests.eval.helpers import evaluation, outcome


@pytest.fixture(scope="module")
def asked(ours):
    return cloze.questions(cloze.shard_texts(ours))[:48]


def accuracy(run: LoadedRun, asked: list[dict], monkeypatch) -> float:
    monkeypatch.setattr(cloze, "questions", lambda texts: asked)
    return outcome(run, "suite=builtin_cloze", "suite.tasks=[cloze]").results["cloze/acc_norm"]


@pytest.fixture(scope="module")
def knowing(ours, asked):
    """The run with a model trained on the answers."""
    model, harness = copy.deepcopy(ours.model).train(), HarnessModel(ours)
    pairs = [harness._encode_pair(q["context"], " " + q["choices"][q["gold"]]) for q in asked]
    rows = torch.tensor([(context + answer)[-ours.context - 1 :] for context, answer in pairs])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        (model.loss(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()).backward()
        optimizer.step()
    return LoadedRun(ours.dir, ours.config, 0, 0, model.eval(), ours.tokenizer, ours.runtime)


def test_the_questions_are_fair(asked, ours):
    assert [q["gold"] for q in asked].count(0) < len(asked) / 2 and {q["gold"] for q in asked} == {0, 1, 2, 3}
    text = "\n\n".join(cloze.shard_texts(ours))
    for question in asked:
        assert len(set(question["choices"])) == 4
        assert f"{question['context']} {question['choices'][question['gold']]}" in text
        assert all(choice in text for choice in question["choices"])
    assert cloze.questions(cloze.shard_texts(ours))[:48] == asked


def test_a_model_that_knows_the_answers_scores_and_shuffled_answers_do_not(knowing, asked, monkeypatch):
    assert accuracy(knowing, asked, monkeypatch) > 0.9
    draw = random.Random(0)
    shuffled = [question | {"gold": draw.randrange(4)} for question in asked]
    assert accuracy(knowing, shuffled, monkeypatch) == pytest.approx(0.25, abs=0.19)  # three standard deviations


# --- local files ------------------------------------------------------------------------------------------------------

ARC = {
    "id": "1",
    "question": "Which is warm?",
    "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
    "answerKey": "B",
}
SCIQ = {"question": "What is wet?", "distractor1": "sand", "distractor2": "stone", "distractor3": "air",
        "correct_answer": "water", "support": ""}  # fmt: skip
BOOLQ = {"question": "is it so", "passage": "It is so.", "label": 1}
MMLU = {"question": "How many?", "choices": ["one", "two", "three", "four"], "answer": 2}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbered(row: dict, count: int) -> list[dict]:
    return [row | {"question": f"{row['question']} ({number})"} for number in range(count)]


@pytest.fixture
def benchmarks(tmp_path):
    folder = tmp_path / "benchmarks"
    write(folder / "arc_easy_test.jsonl", numbered(ARC, 6))
    write(folder / "sciq_validation.jsonl", numbered(SCIQ, 5))
    write(folder / "boolq_validation.jsonl", numbered(BOOLQ, 4))
    write(folder / "boolq_train.jsonl", numbered({"question": "was it so", "passage": "Once.", "label": 0}, 4))
    return folder


def test_a_paper_suite_is_shown_next_to_the_papers_numbers(trained, benchmarks, capsys):
    arguments = ["suite=paper_zeroshot", "suite.tasks=[arc_easy,sciq]", f"suite.data_dir={benchmarks}", "limit=4"]
    assert eval_run.main(evaluation(f"run={trained}", *arguments)) == 0
    name = "results/paper_zeroshot_limit=4_tasks=arc_easy+sciq"
    record = json.loads((trained / f"{name}.json").read_text())
    results = record["results"]
    assert results["average"] == pytest.approx((results["arc_easy/acc_norm"] + results["sciq/acc_norm"]) / 2)
    assert record["questions"] == {"arc_easy": 4, "sciq": 4} and record["stderr"].keys() >= {"sciq/acc_norm"}
    shown, table = capsys.readouterr().out, (trained / f"{name}.md").read_text()
    assert "paper: TPA, small" in shown and "51.26" in shown and "± standard error" in shown
    cells = [f"{100 * results[key]:.2f}" for key in ("arc_easy/acc_norm", "sciq/acc_norm")]
    assert f"| {' | '.join(cells)} |" in " ".join(table.split())
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/sciq/acc"] == results["sciq/acc"] and last["eval/paper_zeroshot/average"] == results["average"]


def test_the_paper_suites_are_the_papers():
    for shots, name in ((0, "paper_zeroshot"), (2, "paper_twoshot")):
        suite = evaluation("run=x", f"suite={name}").suite
        assert suite.num_fewshot == shots and suite.metrics == published.tasks("paper_zeroshot")
        assert suite.tasks == list(suite.metrics)


def test_examples_come_from_training_questions_or_never_show_the_question(ours, benchmarks):
    tasks = ["suite.tasks=[arc_easy,boolq]", f"suite.data_dir={benchmarks}"]
    found = outcome(ours, "suite=paper_twoshot", *tasks, "suite.samples=true")
    assert found.tasks == {"arc_easy": "arc_easy_2shot", "boolq": "boolq_2shot"}
    samples = [json.loads(line) for line in found.files["_samples.jsonl"].splitlines()]
    for sample in samples:
        context, question = sample["arguments"][0][0], sample["doc"]["question"]
        assert context.count(question) == 1 and context.rstrip().endswith("Answer:")
        assert context.count("Question:") == 3
        assert context.count("Once.") == (2 if sample["task"] == "boolq" else 0)


def test_a_groups_tasks_may_share_a_file(ours, tmp_path):
    subjects = [task.removeprefix("mmlu_") for task in find_tasks(["mmlu_stem"]).task_index["mmlu_stem_tasks"].tags]
    rows = [row | {"subject": subject} for subject in subjects for row in numbered(MMLU, 2)]
    write(tmp_path / "mmlu_test_half.jsonl", rows)
    found = outcome(ours, "suite=harness", "suite.tasks=[mmlu_stem]", f"suite.data_dir={tmp_path}")
    assert len(found.details["questions"]) == len(subjects) and found.details["metrics"] == {"mmlu_stem": "acc"}
    per_subject = [value for key, value in found.results.items() if key.startswith("mmlu_") and key != "mmlu_stem/acc"]
    assert found.results["mmlu_stem/acc"] == pytest.approx(sum(per_subject) / len(subjects))


def test_prefetched_files_give_what_the_data_sets_give(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a folder laid out like the hub's data set stands for the hub
    for split, count in (("train", 3), ("validation", 2), ("test", 5)):
        write(tmp_path / f"allenai/sciq/{split}.jsonl", numbered(SCIQ, count))
    direct = outcome(ours, "suite=harness", "suite.tasks=[sciq]")
    arguments = ["suite=harness", "suite.tasks=[sciq]", "suite.data_dir=copies"]
    assert eval_run.main(evaluation(*arguments, "suite.prefetch=true")) == 0
    assert {path.name for path in (tmp_path / "copies").iterdir()} == {
        f"sciq_{s}.jsonl" for s in ("train", "validation", "test")
    }
    assert outcome(ours, *arguments).results == direct.results
    assert direct.details["questions"] == {"sciq": 5}


def test_missing_tasks_and_files_are_named_together(ours, benchmarks):
    with pytest.raises(ConfigError) as caught:
        load_tasks(["piqa", "winogrande", "arc_easy"], str(benchmarks), ours)
    assert len(caught.value.errors) == 2
    assert "has no piqa_<split>.jsonl" in str(caught.value) and "has no winogrande_<split>.jsonl" in str(caught.value)
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_tasks(["piqa"], "none", ours)
    with pytest.raises(ConfigError, match="suite.data_dir is not set"):
        evaluation("suite=harness", "suite.tasks=[piqa]", "suite.prefetch=true")
    with pytest.raises(ConfigError, match="run is not set"):
        evaluation("suite=paper_zeroshot")
    (benchmarks / "arc_easy_test.jsonl").write_text("no JSON")
    with pytest.raises(ConfigError, match="arc_easy_test.jsonl: line 1 is not JSON"):
        load_tasks(["arc_easy"], str(benchmarks), ours)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": "caf\xe9"}\n', "line 2 is not JSON in UTF-8"),
        (b"[1]\n", "line 1 is not an object"),
        (b"[" * 100_000, "line 1 is not JSON in UTF-8"),
    ],
)
def test_questions_that_cannot_be_read_are_named_by_their_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=f"a.jsonl: {message}"):
        read_questions(tmp_path / "a.jsonl")


def test_separators_of_unicode_do_not_end_a_line_of_questions(tmp_path):
    """JSON allows them inside texts, and what prefetching writes has them as they are."""
    texts = ["a\u2028b", "c\u2029d", "e\u0085f\x1c", "\ud83d\ude00"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts[:3]] + ['{"text": "\\ud83d\\ude00"}', ""]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    assert [row["text"] for row in read_questions(tmp_path / "a.jsonl")] == [*texts[:3], "\U0001f600"]


SUITES = [
    ["suite=builtin_cloze", "suite.tasks=[cloze]", "limit=9"],
    ["suite=perplexity", "limit=7"],
    ["suite=long_context", "suite.lengths=[32,128]", "suite.trials=0", "limit=5"],
]
SCRIPT = f"""
import sys
import torch
from eval import loading, run
from tests.eval.helpers import evaluation
torch.distributed.init_process_group("gloo")  # once for all of them
if torch.distributed.get_rank() > 0:
    loading.newest = None  # rank 0 chooses the checkpoint
for suite in {SUITES}:
    assert run.main(evaluation(sys.argv[1], *suite)) == 0
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_find_what_one_finds(trained, tmp_path):
    def found() -> dict:
        asked = [evaluation("run=x", *suite) for suite in SUITES]
        paths = [trained / f"results/{one.suite.name}{name_of(one)}.json" for one in asked]
        return {(path, key): value for path in paths for key, value in json.loads(path.read_text())["results"].items()}

    for suite in SUITES:
        assert eval_run.main(evaluation(f"run={trained}", *suite)) == 0
    one = found()
    script = tmp_path / "several.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, f"run={trained}"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    two = found()
    for key in one:
        if not key[1].endswith(("tokens_per_second", "memory_gb")):
            assert two[key] == pytest.approx(one[key], abs=1e-5), key
