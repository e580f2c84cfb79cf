"""Labels in a plot: none on another or outside it, a line to each that is not next to its point."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_efr.report import labels, plots

pytestmark = pytest.mark.alike


def test_labels_of_thirty_points_in_a_crowd_are_apart_and_within_the_axes() -> None:
    rng = np.random.default_rng(0)
    tokens = np.concatenate([rng.normal(31, 2, 20), rng.uniform(25, 70, 10)])
    accuracy = np.concatenate([rng.normal(92, 0.5, 20), rng.uniform(70, 95, 10)])
    bars = np.array([[0.5], [0.4]])
    points = [
        plots.Point(f"{number}", plots.BASE, x, y, bars, None)
        for number, (x, y) in enumerate(zip(tokens, accuracy, strict=True), start=1)
    ]
    with mpl.rc_context(plots._STYLE):
        figure = Figure(figsize=(6.4, 5.0))
        axis = figure.subplots()
        plots.draw_family(axis, points, points[:2])
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()  # as it is kept
    boxes = [text.get_window_extent(renderer) for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == [p.text for p in points]
    frame = axis.bbox.extents
    for own, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:own])
        assert np.all(box.min >= frame[:2])
        assert np.all(box.max <= frame[2:])
    # a line from each point to its label, if this is not next to it, with its end at the label
    to_pixels = axis.transData.transform
    leading = {}
    for line in axis.lines:
        if line.get_linewidth() == 0.7:
            start, end = to_pixels(line.get_xydata())
            leading[tuple(np.round(start, 6))] = end
    assert 5 < len(leading) < 30
    for p, box in zip(points, boxes, strict=True):
        at = to_pixels((p.tokens, p.accuracy))
        gap = np.hypot(*(at - np.clip(at, box.min, box.max)))
        end = leading.get(tuple(np.round(at, 6)))
        assert (end is not None) == (gap > 10 * figure.dpi / 72)
        if end is not None:
            assert np.hypot(*(end - np.clip(end, box.min, box.max))) < 4


def test_a_label_alone_is_next_to_its_point_and_gives_way_to_what_is_there() -> None:
    frame, taken = np.array([0.0, 0.0, 200.0, 100.0]), np.empty((0, 4))
    points, sizes = np.array([[100.0, 50.0]]), np.array([[30.0, 10.0]])
    alone = labels.place(points, sizes, taken, frame)
    assert alone.lined.tolist() == [False]
    way = np.array([np.cos(np.pi / 8), np.sin(np.pi / 8)])  # on the right, and a little above
    middle = points + 9 * way + [15, 1.5 * way[1] * 5]
    np.testing.assert_allclose(alone.middles, middle, rtol=1e-12)
    below = labels.place(points, sizes, np.array([[0.0, 45.0, 200.0, 100.0]]), frame)
    assert below.middles[0, 1] <= 45 - 5
    corner = labels.place(np.array([[199.0, 99.0]]), sizes, taken, frame)
    assert np.all(corner.middles + sizes / 2 <= frame[2:])
    assert np.all(corner.middles - sizes / 2 >= 0)


def test_lines_cross_boxes_and_each_other_where_geometry_says() -> None:
    box = np.array([0.0, 0.0, 2.0, 1.0])
    a = np.array([[-1.0, 0.5], [-1.0, 0.5], [0.5, 0.5], [-1.0, 2.0], [1.0, -1.0], [-1.0, 0.9]])
    b = np.array([[3.0, 0.5], [-0.1, 0.5], [0.6, 0.5], [3.0, 2.0], [1.0, 3.0], [0.5, 2.4]])
    assert labels._crosses(a, b, box).tolist() == [True, False, True, False, True, False]
    diagonal = np.array([0.0, 0.0]), np.array([1.0, 1.0])
    others = (
        np.array([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0]]),
        np.array([[1.0, 0.0], [0.4, 0.6], [3, 1]]),
    )
    assert labels._meet(*diagonal, *others).tolist() == [True, False, False]
    assert labels._overlap(box, np.array([1.0, -1.0, 4.0, 0.25])) == 0.25
    assert labels._overlap(box, np.array([3.0, 0.0, 4.0, 1.0])) == 0.0
