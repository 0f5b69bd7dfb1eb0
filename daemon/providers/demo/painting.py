"""Paint a landscape with Pillow, in small steps, so that previews show it form.

Back to front: sky, light, stars, clouds, hills into the haze, water that mirrors them, trees, a fox, and grain.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import pi, sqrt

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from daemon.providers.demo.brushes import (
    Color,
    Point,
    Size,
    circle,
    ease,
    gradient,
    levels,
    light,
    mix,
    noise,
    pines,
    ramp,
    ridge,
    scaled,
    smooth,
)
from daemon.providers.demo.fox import FOX
from daemon.providers.demo.scene import Scene

_SMOOTH = 2
"""Shapes are drawn this much larger and scaled down: Pillow does not smooth edges."""
_RANGES = 5


def paint(scene: Scene, size: Size) -> Iterator[tuple[float, Image.Image]]:
    """Paints on one canvas.

    Yields:
        How far it is, 0-100, and the canvas as it is then. Each step takes some ten milliseconds for a megapixel.
    """
    easel = _Easel(scene, Image.new("RGB", size))
    steps = easel.steps()
    for number, step in enumerate(steps, 1):
        step()
        yield 100 * number / len(steps), easel.canvas


@dataclass(slots=True)
class _Easel:
    scene: Scene
    canvas: Image.Image

    @property
    def width(self) -> int:
        return self.canvas.width

    @property
    def height(self) -> int:
        return self.canvas.height

    @property
    def unit(self) -> float:
        """The unit of all lengths, so that the picture looks alike in every size."""
        return sqrt(self.width * self.height)

    @property
    def horizon(self) -> float:
        return 0.64 * self.height

    @property
    def corners(self) -> tuple[Point, Point]:
        """Of the bottom, right and left: they close the outline of a range of hills."""
        return (self.width, self.height), (0, self.height)

    def steps(self) -> list[Callable[[], None]]:
        scene = self.scene
        ranges = [partial(self.hills, depth) for depth in range(_RANGES)]
        land = [*ranges[:3], self.water, self.glitter, ranges[-1]] if scene.water else ranges
        return [
            self.sky,
            *([self.stars] if scene.stars else []),
            self.glow,
            self.planet if scene.planet else self.sun,
            partial(self.clouds, 0),
            partial(self.clouds, 1),
            *land,
            *([self.birds] if scene.birds else []),
            *([self.fox] if scene.fox else []),
            self.vignette,
            self.grain,
        ]

    @property
    def sun_at(self) -> Point:
        dice = self.scene.random("sun")
        low = 0.22 if self.scene.stars else dice.uniform(0.30, 0.46)
        return dice.uniform(0.22, 0.78) * self.width, low * self.height

    def sky(self) -> None:
        stops = self.scene.palette.sky
        self.canvas.paste(gradient(stops, self.canvas.size, end=self.horizon / self.height))

    def stars(self) -> None:
        dice, draw = self.scene.random("stars"), ImageDraw.Draw(self.canvas)
        for _ in range(420):
            x, y = dice.uniform(0, self.width), self.horizon * dice.random() ** 1.3
            bright = dice.random() ** 3
            radius = self.unit * (0.0005 + 0.0013 * bright)
            color = mix(self.scene.palette.sky[1], self.scene.palette.light, 0.35 + 0.65 * bright)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

    def glow(self) -> None:
        soft, strong = (0.3, 0.35) if self.scene.stars else (0.55, 0.6)
        self.halo(0.95 * self.unit, soft)
        self.halo(0.38 * self.unit, strong)

    def sun(self) -> None:
        x, y = self.sun_at
        radius = self.unit * (0.045 if self.scene.stars else 0.058)
        self.shape([circle((x, y), radius)], self.scene.palette.light)
        if self.scene.stars:
            for dx, dy, size in ((-0.3, -0.2, 0.24), (0.25, 0.3, 0.17), (0.1, -0.45, 0.11)):
                crater = mix(self.scene.palette.light, self.scene.palette.sky[2], 0.2)
                self.shape([circle((x + dx * radius, y + dy * radius), size * radius)], crater)

    def planet(self) -> None:
        x, y = self.sun_at
        radius, palette = 0.15 * self.unit, self.scene.palette
        color = mix(palette.light, palette.sky[2], 0.35)
        self.shape([_ring((x, y), radius, 0, 2 * pi)], color)
        body = self.mask([circle((x, y), radius)])
        bands = (palette.light, (226, 158, 122), palette.light, (170, 92, 110))
        middle = y / self.height
        self.canvas.paste(gradient(bands, self.canvas.size, start=middle - 0.14, end=middle + 0.14), None, body)
        lit = self.mask([circle((x - 0.35 * radius, y - 0.3 * radius), 1.05 * radius)])
        shadow = ImageChops.multiply(body, ImageChops.invert(lit.filter(ImageFilter.GaussianBlur(radius / 4))))
        self.canvas.paste(palette.sky[0], None, levels(shadow, lambda v: 0.8 * v))
        self.shape([_ring((x, y), radius, 0, pi)], color)

    def clouds(self, layer: int) -> None:
        dice, palette = self.scene.random(f"clouds{layer}"), self.scene.palette
        grey = noise(dice, self.canvas.size, (3 + 2 * layer, 9 + 5 * layer), octaves=5)
        cover, strength = dice.uniform(0.48, 0.56), 0.32 if self.scene.stars else 0.62
        mask = levels(grey, lambda v: strength * ease((v - cover) / 0.28))
        fade = ramp((70, 255, 120, 0), self.canvas.size, end=0.7)
        color = mix(palette.sky[-1 - layer], palette.light, 0.55)
        self.canvas.paste(color, None, ImageChops.multiply(mask, fade))

    def hills(self, depth: int) -> None:
        scene, dice = self.scene, self.scene.random(f"hills{depth}")
        near = depth / (_RANGES - 1)
        base = self.horizon - self.height * (0.03 - 0.31 * near**1.6)
        swing = self.height * (0.10 + 0.05 * near) * (1.5 - 0.6 * near if scene.peaks else 1)
        line = ridge(dice, self.width, base, swing, rough=0.55 if scene.peaks else 0.42, waves=2.2 + 1.6 * (1 - near))
        color = mix(scene.palette.far, scene.palette.near, near**1.15)
        haze = mix(color, scene.palette.sky[-1], 0.55 * (1 - near) + 0.08)
        outlines: list[Sequence[Point]] = [[*line, *self.corners]]
        if scene.trees and depth >= 1:
            outlines += pines(dice, line, self.unit * (0.022 + 0.085 * near**1.5))
        top = min(y for _, y in line) / self.height
        self.canvas.paste(gradient((color, color, haze, haze), self.canvas.size, start=top), None, self.mask(outlines))

    def water(self) -> None:
        level = round(self.horizon)
        depth = self.height - level
        above = self.canvas.crop((0, max(0, level - round(depth * 1.5)), self.width, level))
        mirror = scaled(above.transpose(Image.Transpose.FLIP_TOP_BOTTOM), (self.width, depth))
        mirror = mirror.filter(ImageFilter.BoxBlur((self.unit * 0.012, self.unit * 0.003)))
        tint = Image.new("RGB", mirror.size, mix(self.scene.palette.sky[0], self.scene.palette.near, 0.35))
        deeper = ramp((50, 80, 120, 165), mirror.size)
        self.canvas.paste(Image.composite(tint, mirror, deeper), (0, level))

    def glitter(self) -> None:
        dice, (x, _y) = self.scene.random("glitter"), self.sun_at
        sparks = Image.new("L", self.canvas.size)
        draw = ImageDraw.Draw(sparks)
        for _ in range(520):
            down = dice.random() ** 1.5
            y = self.horizon + down * (self.height - self.horizon)
            spread = self.unit * (0.02 + 0.16 * down)
            half = self.unit * dice.uniform(0.004, 0.010 + 0.035 * down)
            at = x + dice.gauss(0, 1) * spread * 0.55
            thick = max(1, round(self.unit * (0.0008 + 0.0025 * down)))
            draw.line((at - half, y, at + half, y), fill=round(dice.uniform(60, 215)), width=thick)
        self.canvas.paste(self.scene.palette.light, None, sparks.filter(ImageFilter.BoxBlur((self.unit * 0.002, 0.6))))

    def birds(self) -> None:
        dice, draw = self.scene.random("birds"), ImageDraw.Draw(self.canvas)
        middle = dice.uniform(0.2, 0.8) * self.width, dice.uniform(0.14, 0.3) * self.height
        color = mix(self.scene.palette.near, self.scene.palette.sky[1], 0.25)
        for _ in range(dice.randint(5, 9)):
            x, y = middle[0] + dice.gauss(0, 0.07) * self.unit, middle[1] + dice.gauss(0, 0.03) * self.unit
            span = self.unit * dice.uniform(0.007, 0.014)
            lift = span * dice.uniform(0.35, 0.6)
            wings = smooth(
                [(x - span, y - lift), (x - span / 2, y - lift), (x, y), (x + span / 2, y - lift), (x + span, y - lift)]
            )
            draw.line(wings, fill=color, width=max(1, round(self.unit * 0.0022)), joint="curve")

    def fox(self) -> None:
        side = 1 if self.sun_at[0] < self.width / 2 else -1
        tall = 0.24 * self.unit
        left, top = (0.5 + 0.2 * side) * self.width, 0.95 * self.height - tall
        knoll = circle((left + 0.15 * side * tall, 1.02 * self.height), 2.2 * tall, flat=0.25)
        self.shape([knoll], mix(self.scene.palette.near, self.scene.palette.far, 0.12))
        for color, outline in FOX:
            self.shape([[(left + side * x * tall, top + y * tall) for x, y in outline]], color)

    def vignette(self) -> None:
        middle = light(max(self.canvas.size) * 1.9)
        left, top = (middle.width - self.width) // 2, (middle.height - self.height) // 2
        dark = middle.crop((left, top, left + self.width, top + self.height))
        self.canvas.paste((8, 6, 20), None, levels(dark, lambda v: 0.43 * (1 - v) ** 2))

    def grain(self) -> None:
        """A little noise: it hides the steps of the gradients."""
        dust = Image.frombytes("L", self.canvas.size, self.scene.random("grain").randbytes(self.width * self.height))
        dust = levels(dust, lambda v: int(v * 4.99) / 255)
        self.canvas.paste(ImageChops.add(self.canvas, Image.merge("RGB", (dust,) * 3), 1, -2))

    def halo(self, radius: float, strength: float) -> None:
        x, y = self.sun_at
        mask = levels(light(2 * radius), lambda v: strength * v**2)
        self.canvas.paste(self.scene.palette.light, (round(x - radius), round(y - radius)), mask)

    def shape(self, outlines: Sequence[Sequence[Point]], color: Color) -> None:
        self.canvas.paste(color, None, self.mask(outlines))

    def mask(self, outlines: Sequence[Sequence[Point]]) -> Image.Image:
        large = Image.new("1", (self.width * _SMOOTH, self.height * _SMOOTH))
        draw = ImageDraw.Draw(large)
        for outline in outlines:
            draw.polygon([(x * _SMOOTH, y * _SMOOTH) for x, y in outline], fill=1)
        return large.convert("L").reduce(_SMOOTH)


def _ring(middle: Point, radius: float, start: float, end: float) -> list[Point]:
    outer = circle(middle, 1.9 * radius, flat=0.2, start=start, end=end)
    inner = circle(middle, 1.4 * radius, flat=0.2, start=start, end=end)
    return [*outer, *reversed(inner)]
