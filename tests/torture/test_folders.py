"""A part of `python -m tests.torture.folders` that takes seconds: code, links, lines and other runs' rows."""

from tests.torture import folders

QUICK = ["another class", "nested without end", "events: no keys", "checkpoints: strangers", "write through", "pickled"]


def test_damaged_and_hostile_folders_are_held(capsys):
    assert folders.main(QUICK) == 0, capsys.readouterr().out
    assert f"{len(QUICK)} of {len(QUICK)} held" in capsys.readouterr().out


def test_a_damage_that_is_not_held_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(folders.status, "main", lambda arguments: folders.Path(arguments[0], "nowhere").read_text())
    assert folders.main(["aliases"]) == 1
    assert "slurm.status: FileNotFoundError" in capsys.readouterr().out
