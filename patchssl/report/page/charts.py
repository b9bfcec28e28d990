"""Line charts as numbers in a drawing of fixed size, for a template to write as SVG: they follow the page's colors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 420, 250  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 44  # margins
MOST_LINES = 8  # that colors and dashes tell apart
MOST_POINTS = 240  # of a line; of more, means are drawn
MOST_DOTS = 24  # of a line
_LEAST_SPAN = 1e-99  # what is nearer to 0 is drawn as 0
_STEPS = (1, 2, 2.5, 5, 10)

Points = Sequence[tuple[float, float]]


class Tick(NamedTuple):
    at: float
    label: str


class Dot(NamedTuple):
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """One line: `path` for SVG, `place` chooses its color and dashes, dots stand where its points are few."""

    label: str
    place: int
    path: str
    dots: tuple[Dot, ...]
    band: str  # a polygon, an interval around the line; may be empty


@dataclass(frozen=True)
class Chart:
    """All a template needs; coordinates in units of the drawing, y downwards."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    summary: str  # in words, for those who do not see it
    note: str


def line_chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Points], *,
               bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
               x_names: Sequence[str] | None = None, floor: float | None = None) -> Chart | None:
    """A chart of `lines` (label -> points (x, y), finite, by ascending x); None where there is no point.

    `bands` are intervals (x, low, high) around some of them. `x_names` name the places 0, 1, 2 ... of an axis whose
    steps are no amounts. `floor` is a y that the axis reaches down to. Of more than eight lines the first are drawn,
    of more than 240 points means of neighbors.
    """
    drawn = {label: thinned(points) for label, points in list(lines.items())[:MOST_LINES] if points}
    if not drawn:
        return None
    kept = {label: bands[label] for label in drawn if bands and label in bands}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points] + ([] if floor is None else [floor])
    ys += [y for band in kept.values() for _, low, high in band for y in (low, high)]
    x_range = (0.0, max(1.0, len(x_names) - 1.0)) if x_names else (min(0.0, *xs), max(xs))
    x_values = [float(i) for i in range(len(x_names))] if x_names else [x for x in ticks(*x_range) if x <= x_range[1]]
    y_values = ticks(min(ys), max(ys))
    place = _Placement(_scale(*x_range, LEFT, WIDTH - RIGHT), _scale(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP),
                       x_names)
    return Chart(title, x_label, y_label,
                 tuple(place.line(number, label, points, kept.get(label, ()))
                       for number, (label, points) in enumerate(drawn.items())),
                 tuple(Tick(round(place.across(x), 1), place.name(x)) for x in x_values),
                 tuple(Tick(round(place.up(y), 1), _plain(y)) for y in y_values),
                 _summary(f"{title}, {y_label} over {x_label}", drawn), _note(lines))


class _Placement(NamedTuple):
    """Where values stand in the drawing, and what its x axis calls them."""

    across: Callable[[float], float]
    up: Callable[[float], float]
    x_names: Sequence[str] | None

    def name(self, x: float) -> str:
        return self.x_names[int(x)] if self.x_names else _plain(x)

    def path(self, points: Points) -> str:
        return " ".join(f"{'L' if i else 'M'}{self.across(x):.1f} {self.up(y):.1f}" for i, (x, y) in enumerate(points))

    def line(self, number: int, label: str, points: Points, band: Sequence[tuple[float, float, float]]) -> Line:
        dots = tuple(Dot(round(self.across(x), 1), round(self.up(y), 1), f"{label}, {self.name(x)}: {_plain(y)}")
                     for x, y in points)
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        return Line(label, number, self.path(points), dots if len(dots) <= MOST_DOTS else (),
                    f"{self.path(edge)}Z" if edge else "")


def _summary(what: str, lines: Mapping[str, Points]) -> str:
    ends = (f"{label} from {_plain(points[0][1])} to {_plain(points[-1][1])}" for label, points in lines.items())
    return f"{what}: {'; '.join(ends)}."


def _note(lines: Mapping[str, Points]) -> str:
    """What of `lines` is not drawn as it is."""
    notes = [f"{len(lines) - MOST_LINES} more are not drawn"] if len(lines) > MOST_LINES else []
    if any(len(points) > MOST_POINTS for points in lines.values()):
        notes.append(f"lines of more than {MOST_POINTS} rows show means of neighboring rows")
    return "; ".join(notes)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values in even steps that enclose `low` and `high`, at most `most` and two more.

    >>> ticks(0.0, 7.3)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    span = high - low
    if not span > max(abs(high), _LEAST_SPAN) * 1e-9:
        span = abs(high) if abs(high) > _LEAST_SPAN else 1.0
        low, high = low - span / 2, high + span / 2
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * times for times in (*_STEPS, 20) if power * times * most >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def thinned(points: Points) -> Points:
    """`points`, or means of neighbors where they are more than 240."""
    if len(points) <= MOST_POINTS:
        return points
    parts = np.array_split(np.asarray(points, dtype=float), MOST_POINTS)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From values to places in the drawing."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _plain(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
