"""The two commands that show how training holds together, on a small scale."""

import pytest

from tests.distributed import agreement, torture

pytestmark = pytest.mark.distributed


def test_agreement_prints_its_table(capsys):
    assert agreement.main(stages="2", worlds="1") == 0
    out = capsys.readouterr().out
    assert "1 x 1" in out and "1 x 4" in out and "the tolerance 1e-04" in out


def test_agreement_notices_what_does_not_agree(monkeypatch):
    monkeypatch.setitem(agreement.TOLERANCES, "bf16", 1e-9)
    assert agreement.main(stages="0", worlds="1", dtype="bf16") == 1


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(capsys, monkeypatch):
    monkeypatch.setattr(torture, "MOMENTS", ("saving",))
    assert torture.main(kills="1") == 0
    out = capsys.readouterr().out
    assert "1 kills (1 while saving)" in out and "EQUAL those of the undisturbed run" in out
