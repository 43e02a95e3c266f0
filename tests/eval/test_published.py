"""The paper's numbers, as others read them."""

import pytest

from eval import published


def test_every_row_is_whole_and_has_its_average():
    suite, counted = "paper_zeroshot", 0
    for size in published.SIZES:
        for row in published.rows(suite, size):
            scores = row["scores"].values()
            assert len(scores) == len(published.tasks(suite)) == 9
            assert sum(scores) / 9 == pytest.approx(row["average"], abs=0.05)
            counted += 1
    assert counted == 26


def test_the_nearest_size_is_nearest_in_ratio():
    assert published.nearest("paper_zeroshot", 2_600_000) == "small"
    assert published.nearest("paper_zeroshot", 600_000_000) == "large"
    assert published.nearest("paper_zeroshot", 3_000_000_000) == "xl"
    tpa = published.rows("paper_zeroshot", "medium")[-1]
    twoshot = published.rows("paper_twoshot", published.nearest("paper_twoshot", 300_000_000))
    assert [(row["model"], row["scores"], row["average"]) for row in twoshot] == [
        ("MHA", {}, 48.11),
        ("TPA", {}, 47.93),
    ]
    assert tpa["model"] == published.NAMES["t6"] and tpa["scores"]["hellaswag"] == 46.83 and tpa["average"] == 51.41
