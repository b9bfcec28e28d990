import re

import numpy as np
from cases import each
from hypothesis import given
from hypothesis import strategies as st

from patchssl.report.page.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_chart, thinned, ticks

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, numbers)
def test_ticks_are_even_and_enclose_what_is_drawn(a, b):
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    rounding = 1e-6 * max(abs(low), abs(high))
    assert found[0] <= low + rounding and found[-1] >= high - rounding
    assert 2 <= len(found) <= 9
    steps = np.diff(found)
    assert (steps > 0).all() and np.allclose(steps, steps[0], rtol=1e-3)


def points_of(path):
    return [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path)]


def test_a_line_goes_through_its_points():
    chart = line_chart("t", "epoch", "%", {"a": [(0, 0), (5, 50), (10, 100)]}, floor=0.0)
    assert [tick.label for tick in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]
    assert (chart.y_ticks[0].label, chart.y_ticks[-1].label) == ("0", "100")
    assert points_of(chart.lines[0].path) == [
        (LEFT, HEIGHT - BOTTOM), ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2), (WIDTH - RIGHT, TOP)]
    assert chart.summary == "t, % over epoch: a from 0 to 100."
    assert [dot.text for dot in chart.lines[0].dots] == ["a, 0: 0", "a, 5: 50", "a, 10: 100"]


@each("points", [[(0, 1)], [(3, 0), (4, 0)], [(1, -5), (2, 1e9)], [(0, 1e-12), (1, 2e-12)]])
def test_everything_drawn_lies_inside(points):
    chart = line_chart("t", "x", "y", {"a": points})
    for x, y in points_of(chart.lines[0].path):
        assert LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM


def test_an_interval_is_a_closed_band_around_the_line():
    chart = line_chart("t", "x", "y", {"a": [(0, 5), (1, 6)]}, bands={"a": [(0, 4, 6), (1, 5, 7)]})
    (line,) = chart.lines
    band = points_of(line.band)
    assert len(band) == 4 and line.band.endswith("Z")
    (_, first), (_, second) = points_of(line.path)
    assert band[0][1] < first < band[3][1] and band[1][1] < second < band[2][1]  # y grows downwards


def test_named_places_are_evenly_spaced():
    chart = line_chart("t", "JPEG quality", "%", {"a": [(0, 1), (2, 3)]}, x_names=["3", "5", "75"])
    assert [tick.label for tick in chart.x_ticks] == ["3", "5", "75"]
    assert np.allclose(np.diff([tick.at for tick in chart.x_ticks]), (WIDTH - LEFT - RIGHT) / 2, atol=0.06)
    assert chart.lines[0].dots[1].text == "a, 75: 3"


def test_long_lines_become_means_and_many_lines_are_cut_and_both_is_said():
    points = [(float(i), float(i % 2)) for i in range(2400)]
    few = thinned(points)
    assert len(few) == 240 and all(y == 0.5 for _, y in few)
    chart = line_chart("t", "x", "y", {str(i): points for i in range(10)})
    assert len(chart.lines) == 8 and "2 more" in chart.note and "means" in chart.note
    assert [line.place for line in chart.lines] == list(range(8))


def test_nothing_to_draw_is_no_chart():
    assert line_chart("t", "x", "y", {}) is None
    assert line_chart("t", "x", "y", {"a": []}) is None
