"""Line charts and stacked bars as inline SVG, for pages that load nothing: colours and fonts are the page's.

Whatever a page shows goes through `template`, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jinja2
from markupsafe import Markup

#: Classes ``c0`` .. that the page gives a colour for light and one for dark surroundings.
COLORS = 8
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 34
#: Points drawn of one curve; of more, evenly many are left out.
_MOST_POINTS = 250
#: Numbers beyond it are drawn at it, and those below its inverse as 0: their differences and ratios are numbers too.
_EXTREME = 1e150

Curve = Sequence[tuple[float, float]]


_ENVIRONMENT = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def template(source: str) -> Callable[..., Markup]:
    """A function from named values to HTML; what is no `Markup` itself is text, and is escaped."""
    compiled = _ENVIRONMENT.from_string(source)
    return lambda **values: Markup(compiled.render(**values))


_FIGURE = template(
    """<figure><figcaption>{{ title }}</figcaption>
<svg class="chart" viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ label }}">{{ parts }}</svg>
{{ below }}</figure>"""
)
_NOTHING = template("<figure><figcaption>{{ title }}</figcaption><p>no finite value</p></figure>")
_GRID = template(
    """<text class="axis" x="{{ middle }}" y="{{ height - 3 }}">{{ x_title }}</text>
{% for text, y in y_ticks %}
<line class="grid" x1="{{ left }}" y1="{{ y }}" x2="{{ right }}" y2="{{ y }}"/>
<text class="y" x="{{ left - 6 }}" y="{{ y + 3.5 }}">{{ text }}</text>
{% endfor %}
{% for text, x in x_ticks %}
<text class="axis" x="{{ x }}" y="{{ bottom + 14 }}">{{ text }}</text>
{% endfor %}
"""
)
_CURVE = template(
    """<g class="{{ color }} {{ shown }}">
{% for points in pieces %}
<polyline stroke-dasharray="{{ dash }}" points="{{ points }}"/>
{% endfor %}
{% for x, y, hint in dots %}
<circle cx="{{ x }}" cy="{{ y }}" r="4"><title>{{ hint }}</title></circle>
{% endfor %}
</g>"""
)
_BAR = template(
    """<text x="{{ left }}" y="{{ top + 10 }}">{{ name }}</text>
{% for color, x, width, hint in parts %}
<rect class="{{ color }}" x="{{ x }}" y="{{ top + 15 }}" width="{{ width }}" height="15">
<title>{{ hint }}</title></rect>
{% endfor %}
<text x="{{ end }}" y="{{ top + 27 }}">{{ total }}</text>
"""
)
_BAR_KEYS = template(
    """<p class="legend">
{% for color, kind in keys %}
<span class="key"><svg width="12" height="12" aria-hidden="true">
<rect class="{{ color }}" width="12" height="12"/></svg>{{ kind }}</span>
{% endfor %}
</p>"""
)
_LEGEND = template(
    """<p class="legend">
{% for color, dash, name in keys %}
<span class="key"><svg width="28" height="12" aria-hidden="true">
<line class="{{ color }}" x1="0" y1="6" x2="28" y2="6" stroke-dasharray="{{ dash }}"/></svg>{{ name }}</span>
{% endfor %}
</p>"""
)


def style_of(number: int) -> tuple[str, str]:
    """Colour class and dash pattern of the ``number``-th curve: no two of the first 32 are the same."""
    return f"c{number % COLORS}", _DASHES[number // COLORS % len(_DASHES)]


def line_chart(title: str, x_title: str, curves: Mapping[str, Curve]) -> Markup:
    """A figure with one line per name; points tell their values when pointed at; what is not finite is a gap."""
    points = [(x, y) for curve in curves.values() for x, y in curve if math.isfinite(y)]
    if not points:
        return _NOTHING(title=title)
    x_ticks = ticks(*_span(x for x, _ in points), count=6)
    y_ticks = ticks(*_span(y for _, y in points), count=5)
    x_scale = _Scale(x_ticks, _LEFT, _WIDTH - _RIGHT)
    y_scale = _Scale(y_ticks, _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x_ticks, y_ticks, x_scale, y_scale, x_title)]
    for number, (name, curve) in enumerate(curves.items()):
        parts.append(_line(number, name, _thin(curve), x_scale, y_scale, x_title))
    label = f"{title}: " + "; ".join(f"{name}, last {number_text(c[-1][1])}" for name, c in curves.items() if c)
    return _figure(title, label, _HEIGHT, parts)


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]], unit: str) -> Markup:
    """A figure with one bar per name, made of parts, in the order and colours of the parts' first appearance."""
    kinds = list(dict.fromkeys(kind for parts in bars.values() for kind in parts))
    longest = max((sum(parts.values()) for parts in bars.values()), default=0) or 1.0
    room, row = _WIDTH - 2 * _RIGHT - 60, 40
    out = []
    for number, (name, parts) in enumerate(bars.items()):
        left, drawn = float(_RIGHT), []
        for kind, value in parts.items():
            width = room * max(value, 0.0) / longest
            hint = f"{name}, {kind}: {number_text(value)} {unit}"
            drawn.append((style_of(kinds.index(kind))[0], _place(left), _place(width), hint))
            left += width
        total = f"{number_text(sum(parts.values()))} {unit}"
        top, end = _TOP + number * row, _place(left + 6)
        out.append(_BAR(left=_RIGHT, top=top, name=name, parts=drawn, end=end, total=total))
    keys = _BAR_KEYS(keys=[(style_of(number)[0], kind) for number, kind in enumerate(kinds)])
    label = f"{title}: " + "; ".join(f"{name} {number_text(sum(p.values()))} {unit}" for name, p in bars.items())
    return _figure(title, label, _TOP + row * len(bars), out, keys)


def legend(names: Sequence[str]) -> Markup:
    """What the curves of all charts of a page are called."""
    return _LEGEND(keys=[(*style_of(number), name) for number, name in enumerate(names)])


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
        part = (_drawn(value) - self._low) / (self._high - self._low)
        return _place(self._start + part * (self._end - self._start))


def _span(values: Iterable[float]) -> tuple[float, float]:
    """Lowest and highest, apart from each other by more than rounding."""
    values = [_drawn(value) for value in values]
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) * 0.05 or 0.5
        return low - margin, high + margin
    return low, high


def _drawn(value: float) -> float:
    """Within what sums and differences of a few such numbers can hold, and 0 below it."""
    return max(-_EXTREME, min(float(value), _EXTREME)) if abs(value) >= 1 / _EXTREME else 0.0


def _place(value: float) -> float:
    return round(value, 1)


def _thin(curve: Curve) -> Curve:
    if len(curve) <= _MOST_POINTS:
        return curve
    step = (len(curve) - 1) / (_MOST_POINTS - 1)
    return [curve[round(number * step)] for number in range(_MOST_POINTS)]


def _grid(x_ticks: list[float], y_ticks: list[float], x_scale: _Scale, y_scale: _Scale, x_title: str) -> Markup:
    return _GRID(
        middle=(_LEFT + _WIDTH - _RIGHT) / 2,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        bottom=_HEIGHT - _BOTTOM,
        height=_HEIGHT,
        x_title=x_title,
        x_ticks=[(number_text(value), x_scale(value)) for value in x_ticks],
        y_ticks=[(number_text(value), y_scale(value)) for value in y_ticks],
    )


def _line(number: int, name: str, curve: Curve, x_scale: _Scale, y_scale: _Scale, x_title: str) -> Markup:
    color, dash = style_of(number)
    pieces: list[list[str]] = [[]]
    dots = []
    for x, y in curve:
        if not math.isfinite(y):
            pieces.append([])
            continue
        left, top = x_scale(x), y_scale(y)
        pieces[-1].append(f"{left},{top}")
        dots.append((left, top, f"{name}, {x_title} {number_text(x)}: {number_text(y)}"))
    lines = [" ".join(piece) for piece in pieces if len(piece) > 1]
    # Few points are shown; many only when pointed at.
    shown = "few" if len(curve) <= 12 else "many"
    return _CURVE(color=color, shown=shown, dash=dash, pieces=lines, dots=dots)


def _figure(title: str, label: str, height: int, parts: Sequence[Markup], below: str = "") -> Markup:
    whole = Markup("").join(parts)
    return _FIGURE(title=title, label=label, width=_WIDTH, height=height, parts=whole, below=below)
