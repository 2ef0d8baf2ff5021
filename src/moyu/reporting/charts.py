"""Inline SVG: scales, marks and labels. Colours are classes of the style sheet, which defines them for light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

CHARACTER = 7.0  # width of a character at the phone's text size, the larger one
LINE = 13.0
Box = tuple[float, float, float, float]  # left, top, right, bottom
FAR = 7  # lines up and down to which a label may go
STEP = 4.0  # pixels of a line between two places that labels avoid


@dataclass(frozen=True)
class Linear:
    """A linear scale from values to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.stop - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the domain, about `count` of them."""
        span = self.high - self.low
        step = 10 ** math.floor(math.log10(span / count)) if span > 0 else 1.0
        step = next(step * m for m in (1, 2, 5, 10) if span / (step * m) <= count)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Log:
    """A logarithmic scale from values to pixels. Values below the domain are drawn at its edge."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten inside the domain."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        return [10.0**i for i in range(first, last + 1)]


@dataclass
class Canvas:
    """An SVG that grows mark by mark; all text is escaped."""

    width: float
    height: float
    description: str
    parts: list[Markup] = field(default_factory=list)
    taken: list[Box] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str = "grid") -> None:
        """A straight line."""
        self._add('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>', style, x1, y1, x2, y2)

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A line through points. Labels avoid it."""
        for (x1, y1), (x2, y2) in pairwise(points):
            count = max(1, round(math.hypot(x2 - x1, y2 - y1) / STEP))
            for n in range(count):
                x, y = x1 + (x2 - x1) * n / count, y1 + (y2 - y1) * n / count
                self.taken.append((x - 2, y - 2, x + 2, y + 2))
        self._add('<polyline class="{}" points="{}"/>', style, " ".join(f"{x:.1f},{y:.1f}" for x, y in points))

    def rect(
        self, x: float, y: float, width: float, height: float, style: str, opacity: float = 1.0, hint: str = ""
    ) -> None:
        """A rectangle."""
        self._add(
            '<rect class="{}" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}" rx="2"><title>{}</title></rect>',
            style, x, y, max(width, 0.0), height, Markup(f"{opacity:.3f}"), hint,
        )  # fmt: skip

    def dot(self, x: float, y: float, style: str, radius: float = 4.5, hint: str = "") -> None:
        """A circle. Labels avoid it."""
        self.taken.append((x - radius, y - radius, x + radius, y + radius))
        self._add('<circle class="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>', style, x, y, radius, hint)

    def diamond(self, x: float, y: float, style: str, radius: float = 5.0, hint: str = "") -> None:
        """A square on its corner. Labels avoid it."""
        self.taken.append((x - radius, y - radius, x + radius, y + radius))
        corners = " ".join(
            f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in ((0, -radius), (radius, 0), (0, radius), (-radius, 0))
        )
        self._add('<polygon class="{}" points="{}"><title>{}</title></polygon>', style, corners, hint)

    def text(self, x: float, y: float, text: str, anchor: str = "start", style: str = "") -> None:
        """Text on the base line y. Labels avoid it."""
        self.taken.append(self._box(x, y, anchor, len(text) * CHARACTER))
        self._add('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>', style, x, y, anchor, text)

    def label(self, x: float, y: float, text: str, gap: float = 9.0, style: str = "") -> None:
        """Text beside a mark, placed so that it covers as little as possible: draw all marks and lines before the first label."""
        width = len(text) * CHARACTER
        places = [(x + gap, y + 4, "start")]
        for lift in sorted(range(-FAR, FAR + 1), key=abs):
            for out in (gap, gap + 4 * LINE):
                places += [(x + out, y + 4 + lift * LINE, "start"), (x - out, y + 4 + lift * LINE, "end")]
        places += [(x, y - gap, "middle"), (x, y + gap + LINE - 3, "middle")]
        up, wide = (FAR + 2) * LINE, width + gap + 5 * LINE
        near = [t for t in self.taken if t[0] < x + wide and t[2] > x - wide and t[1] < y + up and t[3] > y - up]
        best = min(places, key=lambda p: self._cost(self._box(*p, width), x, y, near))
        if best[2] != "middle" and (abs(best[1] - 4 - y) > LINE / 2 or abs(best[0] - x) > gap + 1):
            self.line(x, y, best[0], best[1] - 4, "leader")
        self.text(*best[:2], text, best[2], style)

    def _box(self, x: float, y: float, anchor: str, width: float) -> Box:
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        return (left, y - LINE + 3, left + width, y + 3)

    def _cost(self, box: Box, x: float, y: float, near: Sequence[Box]) -> float:
        left, top, right, bottom = box
        outside = max(0, -left) + max(0, right - self.width) + max(0, -top) + max(0, bottom - self.height)
        covered = sum(
            max(0.0, min(right, r) - max(left, l)) * max(0.0, min(bottom, b) - max(top, t)) for l, t, r, b in near
        )
        distance = abs((top + bottom) / 2 - y) + abs((left + right) / 2 - x) / 4
        return outside * 1000 + covered * 10 + distance

    def _add(self, template: str, *values: object) -> None:
        self.parts.append(Markup(template).format(*(f"{v:.1f}" if isinstance(v, float) else v for v in values)))

    def svg(self) -> Markup:
        """The whole image, with its description for screen readers."""
        head = Markup('<svg role="img" viewBox="0 0 {} {}" aria-label="{}">').format(
            self.width, self.height, self.description
        )
        return head + Markup("").join(self.parts) + Markup("</svg>")
