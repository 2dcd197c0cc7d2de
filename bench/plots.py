"""Draws a benchmark as SVG, by hand: a bar for each variant, with the spread, and the goals below."""

from __future__ import annotations

from html import escape
from pathlib import Path
from statistics import median

from bench.measures import Sample
from bench.plan import OWN, GoalResult, Result

NAMESPACE = "http://www.w3.org/2000/svg"

MOST = 3
"""How many times as long as the longest of pbsfs a bar may be."""

WIDTH, LABELS, VALUES, BAR, GAP, TOP, LINE = 900, 300, 110, 18, 8, 48, 18

_COLOURS = {OWN: "#2f6f9f", "limit": "#9aa5ad", "part": "#c5ccd1", "model": "#c28a3c"}
_OTHER = "#a0522d"
_MET = {True: "#2e7d32", False: "#c62828", None: "#555555"}


def draw(result: Result) -> str:
    """The whole picture."""
    shown = {name: samples for name, samples in result.samples.items() if samples}
    by_rate = all(samples[0].operations for samples in shown.values())
    values = {
        name: [_value(sample, by_rate=by_rate) for sample in samples] for name, samples in shown.items()
    }
    most = _longest(values)
    scale = (WIDTH - LABELS - VALUES) / most
    unit = "operations a second" if by_rate else "seconds (shorter is better)"
    height = TOP + len(values) * (BAR + GAP) + 16 + len(result.goals) * LINE + 12
    parts = [
        f'<svg xmlns="{NAMESPACE}" width="{WIDTH}" height="{height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(10, 20, f"{result.case.name}: {result.case.measures}", size=14),
        _text(10, 38, f"{unit}; the bar is the median, the line from least to most", colour="#555555"),
    ]
    y = TOP
    for name, found in values.items():
        parts += _bar(y, name, found, scale)
        y += BAR + GAP
    y += 16
    for judged in result.goals:
        parts.append(_text(10, y + 4, _goal(judged), colour=_MET[judged.met]))
        y += LINE
    return "\n".join([*parts, "</svg>", ""])


def _longest(values: dict[str, list[float]]) -> float:
    """The value of the longest bar: what is far beyond pbsfs itself is cut."""
    everything = [value for found in values.values() for value in found]
    own = [value for name, found in values.items() if name.startswith(OWN) for value in found]
    return min(max(everything, default=1.0), MOST * max(own, default=float("inf"))) or 1.0


def _value(sample: Sample, *, by_rate: bool) -> float:
    return sample.rate if by_rate else sample.seconds


def _bar(y: int, name: str, found: list[float], scale: float) -> list[str]:
    colour = next((colour for start, colour in _COLOURS.items() if name.startswith(start)), _OTHER)
    middle = y + BAR / 2
    end = WIDTH - VALUES
    least, most, length = (
        min(end, LABELS + value * scale) for value in (min(found), max(found), median(found))
    )
    return [
        _text(LABELS - 8, y + 13, name, anchor="end"),
        f'<rect x="{LABELS}" y="{y}" width="{length - LABELS:.1f}" height="{BAR}" fill="{colour}"/>',
        f'<line x1="{least:.1f}" y1="{middle}" x2="{most:.1f}" y2="{middle}" stroke="black"/>',
        _text(
            most + 6, y + 13, f"{median(found):,.4g}{'' if LABELS + max(found) * scale <= end + 1 else ' →'}"
        ),
    ]


def _goal(judged: GoalResult) -> str:
    found = "not measured" if judged.median is None else f"{judged.median:.3g}"
    sign = "≥" if judged.goal.at_least else "≤"
    wanted = "" if judged.goal.target is None else f" (goal {sign} {judged.goal.target:g})"
    return f"{judged.goal.text}: {found}{wanted}"


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "black"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
        f"{escape(text)}</text>"
    )


def write(results: list[Result], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for result in results:
        (directory / f"{result.case.name}.svg").write_text(draw(result))
