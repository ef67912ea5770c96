"""Small multiples as SVG: panels of one size with one pair of axes, lines with a band around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLORS = ("#1f5fa8", "#d9772b", "#2f8f5b", "#b3397a", "#7a5cc4", "#8a6d3b", "#c0392b", "#444444")
LEFT, TOP, GAP_X, GAP_Y = 44, 54, 20, 46
"""Around the panels and between them, in pixels."""


@dataclass(frozen=True)
class Line:
    """Points `(x, middle, low, high)`, in the order of x."""

    label: str
    color: str
    points: Sequence[tuple[float, float, float, float]]
    dashed: bool = False
    faint: bool = False
    """Drawn behind the others and without its band, for comparison."""


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Frame:
    """The axes that all panels share: pixels, and the x at the right end. y goes from 0 to 1."""

    width: int
    height: int
    most: float

    def at(self, x: float, y: float) -> str:
        return f"{self.width * x / self.most:.1f},{self.height * (1 - y):.1f}"


def chart(
    panels: Sequence[Panel], title: str, x_label: str, columns: int = 5, size: tuple[int, int] = (170, 110)
) -> str:
    """An SVG document. y goes from 0 to 1, x from 0 to the largest of all panels; `size`: of a panel, in pixels."""
    frame = Frame(*size, most=max(point[0] for panel in panels for line in panel.lines for point in line.points))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    width = max(LEFT + columns * (frame.width + GAP_X), 16 + 8 * len(title))
    height = TOP + rows * (frame.height + GAP_Y) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="10" fill="#333">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="16" font-size="13" font-weight="bold">{escape(title)}</text>',
        *_legend(panels),
    ]
    for index, panel in enumerate(panels):
        x0 = LEFT + index % columns * (frame.width + GAP_X)
        y0 = TOP + index // columns * (frame.height + GAP_Y)
        parts.append(f'<g transform="translate({x0} {y0})">')
        parts += _axes(panel.title, frame, x_label if index >= len(panels) - columns else "", index % columns == 0)
        for line in sorted(panel.lines, key=lambda line: not line.faint):
            parts += _drawn(line, frame)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _legend(panels: Sequence[Panel]) -> list[str]:
    """Each label once, in a row under the title."""
    lines = {line.label: line for panel in panels for line in panel.lines}
    parts, x = [], 8
    for label, line in lines.items():
        parts.append(f'<line x1="{x}" y1="30" x2="{x + 20}" y2="30" {_stroke(line)}/>')
        parts.append(f'<text x="{x + 25}" y="33">{escape(label)}</text>')
        x += 40 + 6 * len(label)
    return parts


def _axes(title: str, frame: Frame, x_label: str, y_labels: bool) -> list[str]:
    parts = [f'<text x="0" y="-5" font-weight="bold">{escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        y = frame.height * (1 - share)
        parts.append(f'<line x1="0" y1="{y:.0f}" x2="{frame.width}" y2="{y:.0f}" stroke="#ddd"/>')
        if y_labels:
            parts.append(f'<text x="-6" y="{y + 3:.0f}" text-anchor="end">{share:.1f}</text>')
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        label = f"{share * frame.most:.0f} {x_label if share == 1 else ''}".strip()
        x, y = share * frame.width, frame.height + 13
        parts.append(f'<text x="{x:.0f}" y="{y}" text-anchor="{anchor}">{escape(label)}</text>')
    return parts


def _drawn(line: Line, frame: Frame) -> list[str]:
    middle = " ".join(frame.at(x, y) for x, y, _, _ in line.points)
    parts = [f'<polyline points="{middle}" fill="none" {_stroke(line)}/>']
    if not line.faint:
        band = [frame.at(x, high) for x, _, _, high in line.points]
        band += [frame.at(x, low) for x, _, low, _ in reversed(line.points)]
        parts.insert(0, f'<polygon points="{" ".join(band)}" fill="{line.color}" opacity="0.12"/>')
    return parts


def _stroke(line: Line) -> str:
    dash = ' stroke-dasharray="4 2"' if line.dashed else ""
    opacity = ' opacity="0.35"' if line.faint else ""
    return f'stroke="{line.color}" stroke-width="1.6"{dash}{opacity}'
