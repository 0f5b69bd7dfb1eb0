"""Draw the elements of a landscape: gradients, light, noise, and lines of hills and trees."""

from collections.abc import Callable, Sequence
from math import cos, pi, sin, sqrt
from random import Random

from PIL import Image

Color = tuple[int, int, int]
Point = tuple[float, float]
Size = tuple[int, int]

_FINE = 256


def mix(one: Color, other: Color, share: float) -> Color:
    """A colour between two; `share` 0 is the first, 1 the other."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def gradient(stops: Sequence[Color], size: Size, *, start: float = 0, end: float = 1) -> Image.Image:
    """Colours from top to bottom, spread evenly between `start` and `end` (shares of the height)."""
    column = Image.new("RGB", (1, _FINE))
    last = len(stops) - 1
    for y in range(_FINE):
        share = min(max((y / (_FINE - 1) - start) / max(end - start, 0.01), 0), 1) * last
        below = min(int(share), last - 1)
        column.putpixel((0, y), mix(stops[below], stops[below + 1], ease(share - below)))
    return scaled(column, size)


def ramp(levels: Sequence[int], size: Size, *, end: float = 1) -> Image.Image:
    """A mask from top to bottom, spread as a gradient is."""
    return gradient([(level, level, level) for level in levels], size, end=end).getchannel(0)


def light(size: float) -> Image.Image:
    """A mask that is bright in its middle and fades to the edge of a square of that size."""
    edge = max(2, round(size))
    return scaled(levels(Image.radial_gradient("L"), lambda v: max(0, 1 - v * sqrt(2))), (edge, edge))


def levels(mask: Image.Image, change: Callable[[float], float]) -> Image.Image:
    """A mask with other values: `change` gets and gives shares of full brightness."""
    table = [round(255 * change(value / 255)) for value in range(256)]
    return mask.point(table)  # pyright: ignore[reportUnknownMemberType]  # Pillow's types name numpy, which is not there


def scaled(image: Image.Image, size: Size) -> Image.Image:
    """A picture in another size, soft where it grows."""
    return image.resize(size, Image.Resampling.BICUBIC)  # pyright: ignore[reportUnknownMemberType]  # as above


def noise(dice: Random, size: Size, cells: Size, *, octaves: int) -> Image.Image:
    """Clouds of grey; `cells` is how many fit in, across and down, at their coarsest."""
    made = Image.new("L", size, 128)
    across, down = cells
    for octave in range(octaves):
        count = across << octave, down << octave
        coarse = Image.frombytes("L", count, dice.randbytes(count[0] * count[1]))
        made = Image.blend(made, scaled(coarse, size), 1 if octave == 0 else 0.5 / (octave + 0.4))
    return made


def ridge(dice: Random, width: int, base: float, swing: float, *, rough: float, waves: float) -> list[Point]:
    """A line of hills from the left edge to the right: waves on waves, each finer and lower by `rough`."""
    octaves: list[tuple[float, list[float]]] = []
    height, scale = 1.0, waves
    for _ in range(7):
        octaves.append((height, [dice.uniform(-1, 1) for _ in range(int(scale) + 3)]))
        height, scale = height * rough, scale * 2
    count = max(60, width // 4)
    line: list[Point] = []
    for number in range(count + 1):
        along = number / count
        rise = sum(size * _between(values, along * (len(values) - 2)) for size, values in octaves)
        line.append((along * width, base - rise * swing))
    return line


def pines(dice: Random, line: Sequence[Point], tall: float) -> list[list[Point]]:
    """Conifers along a ridge, close together and of all heights."""
    trees: list[list[Point]] = []
    x, right = line[0][0], line[-1][0]
    while x < right:
        ground = line[min(int(x / right * (len(line) - 1)), len(line) - 1)][1] + 0.1 * tall
        trees.append(_pine(dice, x, ground, tall * dice.uniform(0.45, 1.0)))
        x += tall * dice.uniform(0.10, 0.42)
    return trees


def circle(middle: Point, radius: float, *, flat: float = 1, start: float = 0, end: float = 2 * pi) -> list[Point]:
    """Points on a circle, or on an arc of it; `flat` below 1 presses it into an ellipse."""
    steps = (start + (end - start) * number / 90 for number in range(91))
    return [(middle[0] + radius * cos(angle), middle[1] + flat * radius * sin(angle)) for angle in steps]


def smooth(points: Sequence[Point], *, closed: bool = False) -> list[Point]:
    """A soft line through all points (Catmull-Rom)."""
    count = len(points)
    curve: list[Point] = []
    for number in range(count if closed else count - 1):
        near = [number - 1, number, number + 1, number + 2]
        a, b, c, d = (points[i % count] if closed else points[min(max(i, 0), count - 1)] for i in near)
        for step in range(8):
            t = step / 8
            curve.append((_spline(a[0], b[0], c[0], d[0], t), _spline(a[1], b[1], c[1], d[1], t)))
    return [*curve, points[0] if closed else points[-1]]


def ease(share: float) -> float:
    """0 to 1 without corners."""
    share = min(max(share, 0), 1)
    return share * share * (3 - 2 * share)


def _between(values: Sequence[float], at: float) -> float:
    below = min(int(at), len(values) - 2)
    return values[below] + (values[below + 1] - values[below]) * ease(at - below)


def _spline(a: float, b: float, c: float, d: float, t: float) -> float:
    return b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))


def _pine(dice: Random, x: float, ground: float, tall: float) -> list[Point]:
    tiers = 5
    half = tall * dice.uniform(0.16, 0.22)
    left: list[Point] = []
    right: list[Point] = []
    for tier in range(1, tiers + 1):
        down = ground - tall + tall * 0.92 * tier / tiers
        reach = half * (tier / tiers) ** 0.8
        left += [(x - reach * dice.uniform(0.85, 1.15), down), (x - reach * 0.42, down - tall * 0.045)]
        right += [(x + reach * dice.uniform(0.85, 1.15), down), (x + reach * 0.42, down - tall * 0.045)]
    return [(x, ground - tall), *left, (x - half * 0.1, ground), (x + half * 0.1, ground), *reversed(right)]
