"""Figures: colours that all readers can tell apart, files that are written whole."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from training.plots import COLOURS, colour_of, new_figure, plot_loss, save_figure

# What a viewer without one kind of cones sees of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
VIEWERS = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Return linear RGB in CIELAB, where distances are those that eyes see."""
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("viewer", VIEWERS)
def test_mechanisms_have_colours_that_every_viewer_can_tell_apart(viewer):
    seen = {name: lab(VIEWERS[viewer] @ linear(colour)) for name, colour in COLOURS.items()}
    distances = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in itertools.combinations(seen, 2)}
    assert min(distances.values()) > (10 if viewer == "no blue" else 17), min(distances, key=distances.get)


def test_colours_can_be_read_on_white_and_never_change():
    for name in [*COLOURS, "mine", "t6 q_rank=12", ""]:
        assert 1.05 / (TO_XYZ[1] @ linear(colour_of(name)) + 0.05) >= 3, name
    assert colour_of("mine") == colour_of("mine") != colour_of("yours")


def test_matplotlib_is_imported_when_something_is_drawn():
    command = [sys.executable, "-c", "import sys, training.plots; print('matplotlib' in sys.modules)"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"


def test_figures_have_the_axes_asked_for_and_are_written_whole(tmp_path):
    figure, axes = new_figure(columns=2, rows=3, width=2, height=1, grid=False)
    assert axes.shape == (3, 2) and new_figure(columns=2)[1].shape == (2,)
    save_figure(figure, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.size == (600, 450)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_a_run_without_a_line_has_a_plot(tmp_path):
    assert plot_loss(tmp_path, "nothing yet", 5.0) == tmp_path / "loss.png"
