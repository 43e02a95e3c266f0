"""What is printed while a run trains."""

import time

from training.report import Report


def test_a_logged_step_is_one_line(capsys):
    report = Report(enabled=True)
    report.first_step, report.started = 0, time.monotonic()
    speed = {"train/loss": 2.3456, "perf/tokens_per_second": 123_456.0}
    report.update(100_000, 100_000, speed | {"val/loss": 2.5, "val/perplexity": 12.2})
    assert capsys.readouterr().out == (
        "step 100000/100000: loss 2.3456, val loss 2.5000, val perplexity 12.2, 123,456 tokens/s, 0:00:00 left\n"
    )
