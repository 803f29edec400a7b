"""What the figures are drawn with."""

from __future__ import annotations

from html import escape

STYLE = """
text { font: 13px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1d2733 }
.head { font-size: 17px; font-weight: 600 } .small { font-size: 12px; fill: #5b6773 } .panel { font-weight: 600 }
.grid { stroke: #e3e7eb }
"""


def drawing(width: float, height: float, label: str, style: str) -> str:
    """The head of an SVG text, on white; `</svg>` ends it."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" aria-label="{escape(label)}">',
            f"<style>{STYLE}{style.lstrip()}</style>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]
    )


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A line from one point to another."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
