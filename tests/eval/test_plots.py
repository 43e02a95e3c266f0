"""Figures: no label covers a point, a line or another label, and ticks are plain numbers."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from eval.plots import label_points, plain_ticks
from eval.speed.plots import plot_decoding
from training.plots import new_figure

CROWDED = {"mha": (3072, 5.88), "mqa": (512, 5.98), "mla": (520, 5.96), "t6_kvonly": (1312, 5.70), "t6": (1376, 5.71)}


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_labels_stand_in_free_places(scale):
    figure, axes = new_figure()
    bars = [[(x, y - 0.05), (x, y + 0.05)] for x, y in CROWDED.values()]
    front = [CROWDED["mla"], CROWDED["t6_kvonly"]]
    for line in (*bars, front):
        axes.plot(*zip(*line, strict=True))
    axes.set_xscale(scale)
    axes.margins(0.15)
    label_points(axes, CROWDED, [front, *bars])
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert boxes.keys() == CROWDED.keys()
    assert not any(a.overlaps(b) for a, b in combinations(boxes.values(), 2))
    for box in boxes.values():
        assert axes.bbox.count_contains(box.corners()) == 4
        assert not box.count_contains(axes.transData.transform(list(CROWDED.values())))
        for a, b in (pair for line in (front, *bars) for pair in pairwise(axes.transData.transform(line))):
            assert not box.count_contains(a + np.linspace(0, 1, 500)[:, None] * (b - a))


def test_ticks_are_plain_numbers():
    figure, axes = new_figure()
    axes.plot([1000, 50000], [1, 1])
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, [1024, 16384])
    figure.draw_without_rendering()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1,024", "16,384"]


def test_decoding_plots_have_the_papers_points_at_its_size(tmp_path):
    line = {"size": "paper_2048", "scope": "attention", "batch": 1, "fold": None, "dtype": "bfloat16", "device": "x",
            "ms": 0.2, "floor_ms": 0.1}  # fmt: skip
    lines = [
        line | {"model": model, "cached": cached, "length": length}
        for model, cached in (("mha", "k, v"), ("t6", "factors"), ("t6", "k, v"), ("other", "k, v"))
        for length in (4096, 65536)
    ]
    (path,) = plot_decoding(lines, tmp_path)
    assert path.name == "decoding_paper_2048_attention.png" and path.stat().st_size > 10_000
