"""The loss curve as SVG for pages and as PNG for everything else.

Both are drawn here from one layout: a plotting library would bring fifteen
packages and a second of start-up for three lines and two axes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 48, 56  # margins, in pixels
MOST_POINTS = 400  # drawn of one line; more would only be drawn over each other
WHITE, GRID, TEXT, PALE, BLUE, ORANGE = range(6)
COLOURS = ("#ffffff", "#e3e6ea", "#4a5058", "#b9cdea", "#1f5fbf", "#d9691e")


@dataclass(frozen=True)
class _Line:
    points: Points
    colour: int
    width: int
    dots: bool = False


@dataclass(frozen=True)
class _Text:
    x: int
    y: int  # of the middle
    text: str
    colour: int = TEXT
    anchor: str = "start"


def draw(training: Points, validation: Points) -> tuple[bytes, bytes]:
    """SVG and PNG of the two losses by step."""
    lines, texts = _layout(training, validation)
    return _svg(lines, texts), _png(lines, texts)


def _layout(training: Points, validation: Points) -> tuple[list[_Line], list[_Text]]:
    values = [y for _, y in (*training, *validation)] or [0.0, 1.0]
    ys = _ticks(min(values), max(values))
    last = max([x for x, _ in (*training, *validation)], default=1.0)
    xs = [x for x in _ticks(0, max(last, 1.0)) if x <= last or x == 0]
    low, high = ys[0], ys[-1]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (right - LEFT) * x / max(last, 1.0),
            bottom - (bottom - TOP) * (y - low) / (high - low),
        )

    def placed(points: Points) -> Points:
        return [at(x, y) for x, y in points]

    lines = [_Line([at(0, y), (right, at(0, y)[1])], GRID, 1) for y in ys]
    lines.append(_Line([(LEFT, bottom), (right, bottom)], TEXT, 1))
    lines.append(_Line(placed(_thinned(training)), PALE, 1))
    lines.append(_Line(placed(_thinned(_smooth(training))), BLUE, 3))
    lines.append(_Line(placed(_thinned(validation)), ORANGE, 3, dots=True))
    texts = [_Text(LEFT - 10, round(at(0, y)[1]), f"{y:g}", anchor="end") for y in ys]
    texts += [_Text(round(at(x, low)[0]), bottom + 20, f"{x:g}", anchor="middle") for x in xs]
    texts.append(_Text((LEFT + right) // 2, bottom + 42, "step", anchor="middle"))
    texts.append(_Text(LEFT, TOP - 26, "training loss", BLUE))
    texts.append(_Text(LEFT + 190, TOP - 26, "validation loss" if validation else "", ORANGE))
    return lines, texts


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around a range, at most eight."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / 6))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _smooth(points: Points) -> Points:
    """Means over a twentieth of the curve around each point: one that trails would lie."""
    half = len(points) // 40
    sums = [0.0, *accumulate(y for _, y in points)]
    out = []
    for i, (x, _) in enumerate(points):
        side = min(half, i, len(points) - 1 - i)
        out.append((x, (sums[i + side + 1] - sums[i - side]) / (2 * side + 1)))
    return out


def _thinned(points: Points) -> Points:
    """Means of runs of points when there are too many; the last point stays."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]
    return [*means, points[-1]]


def _svg(lines: list[_Line], texts: list[_Text]) -> bytes:
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' font-family="sans-serif" font-size="15">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{COLOURS[WHITE]}"/>',
    ]
    for one in lines:
        colour, where = COLOURS[one.colour], " ".join(f"{x:.1f},{y:.1f}" for x, y in one.points)
        out.append(
            f'<polyline points="{where}" fill="none" stroke="{colour}"'
            f' stroke-width="{one.width}" stroke-linejoin="round"/>'
        )
        if one.dots:
            dot = '<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>'
            out += [dot.format(x, y, colour) for x, y in one.points]
    for t in texts:
        out.append(
            f'<text x="{t.x}" y="{t.y + 5}" fill="{COLOURS[t.colour]}"'
            f' text-anchor="{t.anchor}">{t.text}</text>'
        )
    return ("\n".join([*out, "</svg>"]) + "\n").encode()


# Three by five pixels a letter; every digit is one row, in bits.
GLYPHS = {
    **{"0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717"},
    **{"6": "74757", "7": "71122", "8": "75757", "9": "75717", ".": "00002", "-": "00700"},
    **{"+": "02720", "a": "25755", "d": "65556", "e": "74647", "g": "74557", "i": "72227"},
    **{"l": "44447", "n": "75555", "o": "25552", "p": "75744", "r": "75765", "s": "34216"},
    **{"t": "72222", "v": "55552"},
}
PIXEL = 3
ADVANCE = 4 * PIXEL


def _png(lines: list[_Line], texts: list[_Text]) -> bytes:
    canvas = _Canvas()
    for one in lines:
        for a, b in zip(one.points, one.points[1:], strict=False):
            canvas.line(a, b, one.width, one.colour)
        if one.dots:
            for x, y in one.points:
                canvas.square(x, y, 9, one.colour)
    for t in texts:
        shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[t.anchor]
        x = round(t.x - shift * (ADVANCE * len(t.text) - PIXEL))
        for letter in t.text:
            canvas.letter(x, t.y, GLYPHS.get(letter, "00000"), t.colour)
            x += ADVANCE
    return canvas.png()


class _Canvas:
    """A picture of few colours, one byte a pixel."""

    def __init__(self) -> None:
        self.rows = [bytearray(WIDTH) for _ in range(HEIGHT)]

    def square(self, x: float, y: float, side: int, colour: int) -> None:
        left, top = round(x - (side - 1) / 2), round(y - (side - 1) / 2)
        for row in self.rows[max(0, top) : max(0, top + side)]:
            for i in range(max(0, left), min(WIDTH, left + side)):
                row[i] = colour

    def line(self, a: tuple[float, float], b: tuple[float, float], width: int, colour: int) -> None:
        count = max(1, math.ceil(max(abs(b[0] - a[0]), abs(b[1] - a[1]))))
        for i in range(count + 1):
            way = i / count
            x, y = a[0] + way * (b[0] - a[0]), a[1] + way * (b[1] - a[1])
            self.square(x, y, width, colour)

    def letter(self, x: int, y: int, glyph: str, colour: int) -> None:
        for down, bits in enumerate(glyph, -2):
            for right, bit in enumerate((4, 2, 1)):
                if int(bits) & bit:
                    self.square(x + right * PIXEL + 1, y + down * PIXEL, PIXEL, colour)

    def png(self) -> bytes:
        head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 3, 0, 0, 0)
        palette = b"".join(bytes.fromhex(c[1:]) for c in COLOURS)
        pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in self.rows), 9)
        chunks = ((b"IHDR", head), (b"PLTE", palette), (b"IDAT", pixels), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c))
            for n, c in chunks
        )
