"""Results -> OUT/strong.svg and OUT/weak.svg, and a table of measured and predicted figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from charts import Line, Panel, draw
from results import Seen

GIB = 2.0**30
PANELS = {
    "tokens_per_second": "tokens/s of training, all ranks",
    "efficiency": "FLOP/s per rank over the first point's",
    "mfu": "MFU of training",
    "bubble": "bubble of the busiest stage",
    "memory": "memory of the fullest rank, GiB",
}
NOTE = "solid: measured (median, lowest to highest)\ndashed: predicted by the plan"


def draw_all(points: Sequence[Seen], out: Path) -> list[Path]:
    """One file per kind of scaling that has points."""
    written = []
    for kind in ("strong", "weak"):
        found = [one for one in points if one.point.scaling == kind]
        if found:
            names = list(dict.fromkeys(one.point.series for one in found))
            written.append(out / f"{kind}.svg")
            draw([_panel(name, found, names) for name in PANELS], names, NOTE, written[-1])
    return written


def efficiency(one: Seen, first: Seen, figures: str = "measured") -> float:
    """FLOP/s per rank of a point over those of its series' first point: with one model and one
    length the share of ideal scaling that tokens/s reach."""
    rate = getattr(one, figures)["tflops_per_rank"] / getattr(first, figures)["tflops_per_rank"]
    return float(rate)


def _panel(name: str, points: Sequence[Seen], series: Sequence[str]) -> Panel:
    lines = []
    for colour, label in enumerate(series):
        row = [one for one in points if one.point.series == label]
        row.sort(key=lambda one: one.point.ranks)
        measured = [one for one in row if one.measured]
        lines.append(_line(name, row, colour, "predicted"))
        if measured:
            lines.append(_line(name, measured, colour, "measured"))
    percent = name in ("efficiency", "mfu", "bubble")
    return Panel(PANELS[name], lines, percent, logarithmic=name == "tokens_per_second")


def _line(name: str, row: Sequence[Seen], colour: int, figures: str) -> Line:
    x = [one.point.ranks for one in row]
    if name == "efficiency":
        y = [efficiency(one, row[0], figures) for one in row]
        return Line(colour, x, y, dashed=figures == "predicted")
    size = GIB if name == "memory" else 1.0
    y = [getattr(one, figures)[name] / size for one in row]
    if figures == "predicted":
        return Line(colour, x, y, dashed=True)
    low, high = ([getattr(one, end)[name] / size for one in row] for end in ("low", "high"))
    return Line(colour, x, y, low, high)


def table(points: Sequence[Seen]) -> str:
    """Markdown: per point the measured figures, each with predicted / measured behind it; where
    nothing was measured, what is predicted."""
    lines = [
        "| series | ranks | model | layout | tokens/s | efficiency | MFU | bubble | memory GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first: dict[str, Seen] = {}
    for one in points:
        base = first.setdefault(one.point.series, one)
        lines.append(_row(one, base))
    return "\n".join(lines)


def _row(one: Seen, first: Seen) -> str:
    figures = "measured" if one.measured else "predicted"
    shown = one.measured or one.predicted
    share = f"{efficiency(one, first, figures):.0%}"
    cells = [one.point.series, str(one.point.ranks), Path(one.point.model).name, one.point.layout]
    tokens, mfu = f"{shown['tokens_per_second']:,.0f}", f"{shown['mfu']:.1%}"
    bubble, memory = f"{shown['bubble']:.1%}", f"{shown['memory'] / GIB:.2f}"
    if one.measured:
        tokens += f" (x{one.predicted['tokens_per_second'] / shown['tokens_per_second']:.2f})"
        share += f" ({efficiency(one, first, 'predicted'):.0%})"
        mfu += f" ({one.predicted['mfu']:.1%})"
        bubble += f" ({one.predicted['bubble']:.1%})"
        memory += f" (x{one.predicted['memory'] / shown['memory']:.2f})"
    return "| " + " | ".join([*cells, tokens, share, mfu, bubble, memory]) + " |"
