"""The commands `agreement` and `torture` on a small scale, and a sweep on several processes."""

import json

from tests.distributed import agreement, torture
from tests.distributed.helpers import run


def test_agreement_prints_its_table(capsys):
    assert agreement.main(stages="2", worlds="1") == 0
    out = capsys.readouterr().out
    assert "1 x 1" in out and "1 x 4" in out and "the tolerance 1e-04" in out


def test_agreement_reports_what_does_not_agree(monkeypatch):
    monkeypatch.setitem(agreement.TOLERANCES, "bf16", 1e-9)
    assert agreement.main(stages="0", worlds="1", dtype="bf16") == 1


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(capsys, monkeypatch):
    monkeypatch.setattr(torture, "MOMENTS", ("saving",))
    monkeypatch.setattr(torture, "STEPS_A_LIFE", 6)
    assert torture.main(kills="1", processes="1") == 0
    out = capsys.readouterr().out
    assert "1 kills (1 while saving)" in out and "equal those of the undisturbed run" in out


def test_a_sweep_on_two_processes(small_run, tmp_path):
    """One process group after the other in the same processes, through the one store of the launcher."""
    each = [f"run.dir={tmp_path}/${{model.name}}", "trainer.max_steps=2", "trainer.samples=0"]
    run(["-m", *small_run, "model=mha,t6", *each, f"hydra.sweep.dir={tmp_path}/sweep"], processes=2)
    for name in ("mha", "t6"):
        assert json.loads((tmp_path / name / "summary.json").read_text())["step"] == 2
