"""Marks that coincide can be told apart, and labels stay within what they belong to."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from analysis.figures import style

FAMILIES = ["dense", "moe", "memory_plus", "peer", "engram"]
LONG = "answer NLL of the validation questions at the last exposure that all runs reached, nats"


def pixels(image: np.ndarray, color: str) -> int:
    """Return how many pixels of (height, width, RGBA) have a colour, up to what antialiasing changes."""
    return int((np.abs(image[..., :3] / 255 - to_rgb(color)).max(-1) < 0.1).sum())


def image_of(looks: dict[str, style.Look], **options: Any) -> np.ndarray:
    """Return the pixels of one horizontal line that is drawn with every look."""
    with style.figure(1, 1) as (drawn, (axis,)):
        axis.set_axis_off()
        for look in looks.values():
            marks = {"color": look.color, "linestyle": look.linestyle, "marker": look.marker, "markersize": look.size}
            axis.plot(np.linspace(0, 1, 6), np.zeros(6), **(marks | options))
        drawn.canvas.draw()
        return np.asarray(drawn.canvas.buffer_rgba())


@pytest.mark.parametrize("names", [FAMILIES[:2], FAMILIES])
def test_of_coinciding_curves_a_part_of_each_is_seen(names: list[str]) -> None:
    looks = style.looks([(name, name) for name in names])
    image = image_of(looks, marker="none")
    seen = [pixels(image, look.color) for look in looks.values()]
    assert min(seen) > 0.1 * sum(seen)


def test_of_two_coinciding_markers_both_are_seen() -> None:
    looks = style.looks([(name, name) for name in ("dense", "peer")])
    image = image_of(looks, linestyle="none")
    seen = [pixels(image, look.color) for look in looks.values()]
    assert min(seen) > 0.1 * sum(seen)


def test_variants_of_a_family_have_one_colour_and_dashes_of_their_own() -> None:
    looks = style.looks([("moe", "moe"), *(("pkm", f"pkm k{keys}") for keys in range(6))])
    assert len({look.color for look in looks.values()}) == 2
    assert len({look.linestyle for look in looks.values()}) == len(looks)


@pytest.mark.parametrize("columns", [1, 3])
def test_a_long_label_is_broken_to_the_length_of_its_axis(columns: int, tmp_path: Path) -> None:
    with style.figure(1, columns, height=2.4) as (drawn, axes):
        axes[0].set_ylabel(LONG)
        axes[-1].set_xlabel(LONG)
        style.save(drawn, tmp_path, "figure", "A note.")
        y, x = axes[0].yaxis.label, axes[-1].xaxis.label
        assert y.get_window_extent().height <= axes[0].get_window_extent().height
        assert x.get_window_extent().width <= axes[-1].get_window_extent().width
        assert [label.get_text().replace("\n", " ") for label in (x, y)] == [LONG, LONG]


def test_long_entries_of_a_legend_stay_in_the_figure(tmp_path: Path) -> None:
    with style.figure(1, 1, width=4.4) as (drawn, axes):
        for number in range(3):
            axes[0].plot([0, 1], label=f"{number} {LONG}")
        style.legend_above(drawn, axes)
        style.save(drawn, tmp_path, "figure", "A note.")
        legend = drawn.legends[0].get_window_extent()
        assert legend.x0 >= 0
        assert legend.x1 <= drawn.bbox.x1
        assert legend.y0 >= axes[0].get_window_extent().y1


def test_long_names_of_rows_leave_room_for_the_panel_and_do_not_overlap(tmp_path: Path) -> None:
    names = style.row_names([f"{number} {LONG}" for number in range(4)])
    with style.figure(1, 1, width=6.4, height=1.2 + style.row_height(names) * len(names)) as (drawn, (axis,)):
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        style.save(drawn, tmp_path, "figure", "A note.")
        extents = [label.get_window_extent() for label in axis.get_yticklabels()]
        assert axis.get_window_extent().width > drawn.bbox.width / 3
        assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(extents))
