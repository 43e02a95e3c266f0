"""docs/adding-a-mechanism.md as it stands: its two files, outside the package, pass what every mechanism passes."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

BLOCKS = dict(
    re.findall(r"```(python|yaml)\n(.*?)```", (ROOT / "docs/adding-a-mechanism.md").read_text(), flags=re.DOTALL)
)


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "configs/model").mkdir(parents=True)
    (tmp_path / "tied_kv.py").write_text(BLOCKS["python"])
    (tmp_path / "configs/model/tied_kv.yaml").write_text(BLOCKS["yaml"])
    return os.environ | {"PYTHONPATH": str(tmp_path), "T6_CONFIGS": f"{tmp_path}/configs"}


def run(environment, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_generic_tests_run_on_it(environment):
    files = ("tests/model/test_every_mechanism.py", "tests/model/test_decoding.py")
    out = run(environment, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-k", "tied_kv", *files)
    passed = re.findall(r"::(\w+)\[tied_kv.*PASSED", out)
    assert set(passed) >= {
        "test_every_size_builds_with_the_counted_parameters_and_the_parameters_of_mha",
        "test_a_later_token_changes_no_earlier_logit",
        "test_one_batch_is_learnt_by_heart",
        "test_cache_shapes_are_what_the_factors_have",
        "test_cached_decoding_is_the_full_pass",
        "test_lower_precision_comes_close_and_bytes_are_those_counted",
        "test_a_step_compiles_once",
    }


def test_it_trains(environment, small_run, tmp_path):
    run(environment, "train.py", "model=tied_kv", *small_run)
    assert "tied_kv" in (tmp_path / "run/config.yaml").read_text()
    run(environment | {"T6_PACKAGES": "tied_kv"}, "-m", "eval.run", f"run={tmp_path}/run", "limit=2")
    assert (tmp_path / "run/results/perplexity_limit=2.json").exists()
