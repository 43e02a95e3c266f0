"""The benchmark of attention alone prints what it says it prints."""

import json

import pytest

from configs.app import configured
from configs.errors import ConfigError
from eval.speed.attention import AttentionSpeedConfig, exponent, main


def config(*overrides: str) -> AttentionSpeedConfig:
    return configured(AttentionSpeedConfig, ["device=cpu", "n_heads=1", "rounds=1", *overrides])


def test_a_row_for_each_core_and_length_and_the_growth_of_each(capsys):
    cores = ["full", "sliding_window core.window=16", "sequence_tensor"]
    assert main(config(f"cores={cores}", "lengths=[48,96]", "exponent_from=1")) == 0
    *rows, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [(row["length"], row["core"]) for row in rows] == [(n, core) for n in (48, 96) for core in cores]
    assert set(last["exponents"]) == set(cores) and all(isinstance(n, float) for n in last["exponents"].values())
    for row in rows:
        assert row["ms"] > 0 and row["tokens_per_second"] == pytest.approx(1e3 * row["length"] / row["ms"])
        assert row["memory_bytes"] is None or row["memory_bytes"] >= 0
    assert [row["times_as_fast"] for row in rows if row["core"] == "full"] == [1, 1]
    assert rows[2]["fold"] == [16, 3] and rows[5]["fold"] == [16, 6]  # auto, at each length
    assert rows[3]["flops"] == 3 * 4 * rows[3]["head_dim"] * (96 + 1) / 2 * 96


def test_the_exponent_is_that_of_a_power_law():
    assert exponent([{"length": n, "compared_ms": 3 * n**1.5} for n in (64, 256, 1024)]) == pytest.approx(1.5)
    assert exponent([{"length": 64, "compared_ms": 1.0}]) is None


def test_mistakes_are_named_before_anything_runs(capsys):
    for override, message in (
        ("cores=[]", "name at least one"),
        ("lengths=[48,0]", "must be at least 2"),
        ("cores=['sequence_tensor core.fold=[0]']", "core.fold"),
        ("cores=['full core.kernel=factors']", "no factors"),
        ("cores=[full,'sliding_window core.windw=2']", "did you mean core.window"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(config("lengths=[48]", override))
    assert not capsys.readouterr().out
