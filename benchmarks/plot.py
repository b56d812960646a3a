"""A plot of bars on a logarithmic scale, one panel a figure, one bar a proxy, as SVG by hand: no library, a few KiB,
readable on a light page and on a dark one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

NAMES, BARS, VALUES, ROW, TITLE, MARGIN = 190, 400, 70, 20, 44, 12
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .tick { font-size: 10px; fill: #59636e } .grid { stroke: #d1d9e0 }
.other { fill: #8c959f } .own { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .tick { fill: #9198a1 } .grid { stroke: #3d444d }
  .other { fill: #6e7681 } .own { fill: #4493f8 }
}
"""


def bars(title: str, panels: Mapping[str, Mapping[str, float]], *, own: str) -> str:
    """Panels by their titles, in each a value by name; those whose name begins with ``own`` stand out."""
    parts, top = [], MARGIN
    for name, values in panels.items():
        known = {key: value for key, value in values.items() if value > 0}
        if known:
            parts.append(f'<g transform="translate(0 {top})">\n{_panel(name, known, own)}</g>\n')
            top += TITLE + ROW * len(known) + MARGIN
    width = NAMES + BARS + VALUES
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" role="img">\n'
    return f"{head}<title>{escape(title)}</title>\n<style>{STYLE}</style>\n{''.join(parts)}</svg>\n"


def _panel(title: str, values: Mapping[str, float], own: str) -> str:
    low = math.floor(math.log10(min(values.values()) * 0.999))
    high = max(low + 1, math.ceil(math.log10(max(values.values()))))
    bottom = TITLE + ROW * len(values)
    lines = [f'<text class="title" x="{NAMES}" y="14">{escape(title)}, logarithmic</text>']
    for power in range(low, high + 1):
        x = NAMES + BARS * (power - low) / (high - low)
        lines.append(f'<line class="grid" x1="{x:.0f}" x2="{x:.0f}" y1="{TITLE - 8}" y2="{bottom}"/>')
        lines.append(
            f'<text class="tick" x="{x:.0f}" y="{TITLE - 12}" text-anchor="middle">{_number(10.0**power)}</text>'
        )
    for index, (name, value) in enumerate(values.items()):
        y, length = TITLE + ROW * index, BARS * (math.log10(value) - low) / (high - low)
        kind = "own" if name.startswith(own) else "other"
        lines.append(f'<text x="{NAMES - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        lines.append(f'<rect class="{kind}" x="{NAMES}" y="{y + 3}" width="{length:.1f}" height="{ROW - 6}" rx="2"/>')
        lines.append(f'<text x="{NAMES + length + 6:.1f}" y="{y + 13}">{_number(value)}</text>')
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
