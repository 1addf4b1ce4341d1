"""Line charts and stacked bars as inline SVG, for pages that load nothing: colours and fonts are the page's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

#: Classes ``c0`` .. that the page gives a colour for light and one for dark surroundings.
COLORS = 8
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 34
#: Points drawn of one curve; of more, evenly many are left out.
_MOST_POINTS = 250

Curve = Sequence[tuple[float, float]]


def style_of(number: int) -> tuple[str, str]:
    """Colour class and dash pattern of the ``number``-th curve: no two of the first 32 are the same."""
    return f"c{number % COLORS}", _DASHES[number // COLORS % len(_DASHES)]


def line_chart(title: str, x_title: str, curves: Mapping[str, Curve]) -> str:
    """A figure with one line per name; points tell their values when pointed at; what is not finite is a gap."""
    points = [(x, y) for curve in curves.values() for x, y in curve if math.isfinite(y)]
    if not points:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>no finite value</p></figure>"
    x_ticks = ticks(*_span(x for x, _ in points), count=6)
    y_ticks = ticks(*_span(y for _, y in points), count=5)
    x_scale = _Scale(x_ticks, _LEFT, _WIDTH - _RIGHT)
    y_scale = _Scale(y_ticks, _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x_ticks, y_ticks, x_scale, y_scale, x_title)]
    for number, (name, curve) in enumerate(curves.items()):
        parts.append(_line(number, name, _thin(curve), x_scale, y_scale, x_title))
    label = f"{title}: " + "; ".join(f"{name}, last {number_text(c[-1][1])}" for name, c in curves.items() if c)
    return _figure(title, label, _HEIGHT, parts)


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """A figure with one bar per name, made of parts, in the order and colours of the parts' first appearance."""
    kinds = list(dict.fromkeys(kind for parts in bars.values() for kind in parts))
    longest = max((sum(parts.values()) for parts in bars.values()), default=0) or 1.0
    room, row = _WIDTH - 2 * _RIGHT - 60, 40
    out = []
    for number, (name, parts) in enumerate(bars.items()):
        left, top = float(_RIGHT), _TOP + number * row
        out.append(f'<text x="{left:g}" y="{top + 10}">{escape(name)}</text>')
        for kind, value in parts.items():
            width = room * max(value, 0.0) / longest
            hint = escape(f"{name}, {kind}: {number_text(value)} {unit}")
            out.append(
                f'<rect class="{style_of(kinds.index(kind))[0]}" x="{left:.1f}" y="{top + 15}" width="{width:.1f}" '
                f'height="15"><title>{hint}</title></rect>'
            )
            left += width
        total = f"{number_text(sum(parts.values()))} {unit}"
        out.append(f'<text x="{left + 6:.1f}" y="{top + 27}">{escape(total)}</text>')
    keys = "".join(
        f'<span class="key"><svg width="12" height="12" aria-hidden="true"><rect class="{style_of(number)[0]}" '
        f'width="12" height="12"/></svg>{escape(kind)}</span>'
        for number, kind in enumerate(kinds)
    )
    label = f"{title}: " + "; ".join(f"{name} {number_text(sum(p.values()))} {unit}" for name, p in bars.items())
    return _figure(title, label, _TOP + row * len(bars), out, f'<p class="legend">{keys}</p>')


def legend(names: Sequence[str]) -> str:
    """What the curves of all charts of a page are called."""
    keys = []
    for number, name in enumerate(names):
        color, dash = style_of(number)
        line = f'<line class="{color}" x1="0" y1="6" x2="28" y2="6" stroke-dasharray="{dash}"/>'
        keys.append(
            f'<span class="key"><svg width="28" height="12" aria-hidden="true">{line}</svg>{escape(name)}</span>'
        )
    return f'<p class="legend">{"".join(keys)}</p>'


def number_text(value: float) -> str:
    """Four digits, without noise."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e6 or abs(value) >= 1e15 else f"{value:,.0f}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers that enclose ``low`` and ``high``."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


class _Scale:
    """Numbers between the first and the last tick to places on the page."""

    def __init__(self, tick_values: Sequence[float], start: float, end: float) -> None:
        self._low, self._high, self._start, self._end = tick_values[0], tick_values[-1], start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)


def _span(values: object) -> tuple[float, float]:
    values = list(values)
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.05 or 0.5
        return low - margin, high + margin
    return low, high


def _thin(curve: Curve) -> Curve:
    if len(curve) <= _MOST_POINTS:
        return curve
    step = (len(curve) - 1) / (_MOST_POINTS - 1)
    return [curve[round(number * step)] for number in range(_MOST_POINTS)]


def _grid(x_ticks: list[float], y_ticks: list[float], x_scale: _Scale, y_scale: _Scale, x_title: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<text class="axis" x="{(_LEFT + right) / 2:g}" y="{_HEIGHT - 3}">{escape(x_title)}</text>']
    for value in y_ticks:
        y = y_scale(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{y + 3.5:.1f}">{number_text(value)}</text>')
    for value in x_ticks:
        parts.append(f'<text class="axis" x="{x_scale(value):.1f}" y="{bottom + 14}">{number_text(value)}</text>')
    return "".join(parts)


def _line(number: int, name: str, curve: Curve, x_scale: _Scale, y_scale: _Scale, x_title: str) -> str:
    color, dash = style_of(number)
    pieces: list[list[str]] = [[]]
    dots = []
    for x, y in curve:
        if not math.isfinite(y):
            pieces.append([])
            continue
        at = f"{x_scale(x):.1f},{y_scale(y):.1f}"
        pieces[-1].append(at)
        hint = escape(f"{name}, {x_title} {number_text(x)}: {number_text(y)}")
        left, top = at.split(",")
        dots.append(f'<circle cx="{left}" cy="{top}" r="4"><title>{hint}</title></circle>')
    lines = "".join(
        f'<polyline stroke-dasharray="{dash}" points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1
    )
    # Few points are shown; many only when pointed at.
    shown = "few" if len(curve) <= 12 else "many"
    return f'<g class="{color} {shown}">{lines}{"".join(dots)}</g>'


def _figure(title: str, label: str, height: int, parts: Sequence[str], below: str = "") -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>{below}</figure>"
    )
