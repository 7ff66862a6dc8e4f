"""Panels of lines as an SVG file, without a plotting library; same lines, same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
WIDTH, HEIGHT, LEFT, TOP, COLUMNS = 340, 240, 58, 34, 3


@dataclass(frozen=True)
class Line:
    """One curve: dashed without marks, or solid with marks and a bar from low to high."""

    colour: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A title and its curves over a logarithmic axis of ranks; `percent`: y is a share."""

    title: str
    lines: Sequence[Line]
    percent: bool = False
    logarithmic: bool = False


def draw(panels: Sequence[Panel], legend: Sequence[str], note: str, out: Path) -> None:
    """Write `out`: the panels, then the legend's names in the order of the lines' colours."""
    cells = len(panels) + 1
    rows = -(-cells // COLUMNS)
    width, height = COLUMNS * WIDTH, max(rows * HEIGHT, _legend_height(legend))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts += [_moved(number), *_panel(panel), "</g>"]
    parts += [_moved(len(panels)), *_legend(legend, note), "</g>", "</svg>"]
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _moved(cell: int) -> str:
    return f'<g transform="translate({cell % COLUMNS * WIDTH} {cell // COLUMNS * HEIGHT})">'


class _Axes:
    """Places of values in a panel."""

    def __init__(self, panel: Panel) -> None:
        self.xs = sorted({x for line in panel.lines for x in line.x})
        values = [v for line in panel.lines for part in (line.y, line.low, line.high) for v in part]
        self.logarithmic = panel.logarithmic and min(values, default=0) > 0
        if self.logarithmic:
            self.ticks = _powers(min(values), max(values))
        else:
            step = _step(max(values, default=1.0) or 1.0)
            count = math.ceil((max(values, default=1.0) or 1.0) / step - 1e-9)
            self.ticks = [step * n for n in range(count + 1)]

    def x(self, value: float) -> float:
        first, last = math.log2(self.xs[0]), math.log2(self.xs[-1])
        share = (math.log2(value) - first) / (last - first) if last > first else 0.5
        return LEFT + 8 + share * (WIDTH - LEFT - 28)

    def y(self, value: float) -> float:
        bottom, top = self.ticks[0], self.ticks[-1]
        if self.logarithmic:
            value, bottom, top = math.log10(value), math.log10(bottom), math.log10(top)
        return HEIGHT - 36 - (value - bottom) / (top - bottom) * (HEIGHT - 36 - TOP)


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around low..high; powers of ten alone where they are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    for steps in ((1, 2, 5), (1,)):
        ticks = [step * 10.0**n for n in powers for step in steps]
        first = max(i for i, tick in enumerate(ticks) if tick <= low)
        last = min(i for i, tick in enumerate(ticks) if tick >= high and i > first)
        if last - first < 8:
            break
    return ticks[first : last + 1]


def _step(highest: float) -> float:
    """1, 2 or 5 times a power of ten: four to ten ticks up to `highest`."""
    power = 10.0 ** math.floor(math.log10(highest / 4))
    return power * max(m for m in (1, 2, 5) if m * power <= highest / 4 * (1 + 1e-9))


def _panel(panel: Panel) -> list[str]:
    axes = _Axes(panel)
    right, bottom = WIDTH - 14, HEIGHT - 36
    parts = [f'<text x="{LEFT}" y="20" font-size="13">{escape(panel.title)}</text>']
    for tick in axes.ticks:
        y = axes.y(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        words = _words(tick, panel.percent)
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
    for x in axes.xs:
        parts.append(
            f'<text x="{axes.x(x):.1f}" y="{bottom + 15}" text-anchor="middle">{x:g}</text>'
        )
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 29}" text-anchor="middle">ranks</text>')
    return parts + [piece for line in panel.lines for piece in _line(line, axes)]


def _words(tick: float, percent: bool) -> str:
    if percent:
        return f"{100 * tick:.3g}%"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tick >= 10 * size or (tick >= size and size > 1e3):
            return f"{tick / size:g}{letter}"
    return f"{tick:,.0f}" if tick >= 1000 else f"{tick:.3g}"


def _line(line: Line, axes: _Axes) -> list[str]:
    colour = COLOURS[line.colour % len(COLOURS)]
    places = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    style = 'stroke-dasharray="5 4"' if line.dashed else 'stroke-width="1.7"'
    parts = [f'<path d="M{path}" fill="none" stroke="{colour}" {style}/>']
    if not line.dashed:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    for (x, _), low, high in zip(places, line.low, line.high, strict=False):
        parts.append(f'<path d="M{x:.1f} {axes.y(low):.1f}V{axes.y(high):.1f}" stroke="{colour}"/>')
    if line.dashed and len(places) == 1:  # a line of one point would not be seen
        x, y = places[0]
        parts.append(f'<path d="M{x - 6:.1f} {y:.1f}H{x + 6:.1f}" stroke="{colour}"/>')
    return parts


def _legend_height(legend: Sequence[str]) -> int:
    return 2 * TOP + 18 * (len(legend) + 4)


def _legend(legend: Sequence[str], note: str) -> list[str]:
    parts = []
    for number, name in enumerate(legend):
        y, colour = TOP + 18 * number, COLOURS[number % len(COLOURS)]
        parts.append(f'<path d="M{LEFT} {y}h26" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{LEFT + 34}" y="{y + 4}">{escape(name)}</text>')
    y = TOP + 18 * len(legend) + 10
    for number, words in enumerate(note.splitlines()):
        parts.append(f'<text x="{LEFT}" y="{y + 16 * number}" fill="#555">{escape(words)}</text>')
    return parts
