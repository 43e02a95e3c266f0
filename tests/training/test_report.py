"""What is printed while a run trains."""

import io

from rich.console import Console

from training.report import Report


def test_the_bar_fits_into_80_columns_and_the_line_of_a_validation_has_everything():
    shown = Report(enabled=True)
    shown.console = Console(file=io.StringIO(), width=80, force_terminal=True, highlight=False)
    shown.live = True
    shown.start(0, 100_000)
    speed = {"train/loss": 2.3456, "perf/tokens_per_second": 123_456.0}
    shown.update(99_999, speed | {"val/loss": 2.5, "val/perplexity": 12.2})
    bar = shown.progress.tasks[0].fields["status"]
    shown.stop()
    assert len(f"training ━━━━ 99999/100000 {bar}") < 80 and "val" not in bar
    line = "step 99999/100000: loss 2.3456, val loss 2.5000, val perplexity 12.2"
    assert line in shown.console.file.getvalue().replace("\n", " ")
