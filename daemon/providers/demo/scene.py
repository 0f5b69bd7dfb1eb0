"""Choose a scene by the words of a prompt: a light, a land, and who is in it."""

import colorsys
import re
from dataclasses import dataclass
from random import Random

from PIL import ImageColor

from daemon.prompt import PromptSpec

Color = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Palette:
    """`sky` runs from the zenith to the horizon, `far` and `near` are the first and the last range of hills."""

    sky: tuple[Color, ...]
    light: Color
    far: Color
    near: Color


def _palette(sky: str, light: str, far: str, near: str) -> Palette:
    red, green, blue, last = (_rgb(color) for color in sky.split())
    return Palette((red, green, blue, last), _rgb(light), _rgb(far), _rgb(near))


def _rgb(color: str) -> Color:
    red, green, blue, *_ = ImageColor.getrgb(color)
    return red, green, blue


PALETTES = {
    "sunset": _palette("#2b1b52 #7b2d6e #e0566b #ffb26b", "#ffe3a6", "#b2557d", "#1d1236"),
    "dawn": _palette("#4a6fa5 #9fb4d8 #f3c7c4 #ffe4c2", "#fff4d6", "#a7a3c9", "#2f3b5c"),
    "night": _palette("#060b23 #0f1d47 #23386f #41558f", "#f3f1dc", "#33467d", "#050919"),
    "day": _palette("#2f7fc1 #6fb3dd #b7dcec #f4efdc", "#fffbe6", "#8fb3c4", "#1f4a3f"),
    "green": _palette("#20474f #4f8579 #a9c9a4 #eeeec4", "#fffbd1", "#86ab93", "#0e2a25"),
    "desert": _palette("#3c6e8f #e9b48a #f6d3a1 #fdebc8", "#fff6da", "#d99a73", "#6d2f27"),
    "winter": _palette("#4f739f #9dbad4 #d6e2ec #f8e9e4", "#ffffff", "#b3c6dc", "#3f5a80"),
    "autumn": _palette("#5d4a66 #c4785b #eda85d #fbdc98", "#fff0c2", "#b8745a", "#3a1c22"),
}
_LIGHTS = {
    "night": "night midnight moon moonlit moonlight star stars starry space galaxy cosmos planet dark constellation",
    "sunset": "sunset dusk evening twilight golden",
    "dawn": "dawn sunrise morning mist misty fog foggy pastel",
    "winter": "winter snow snowy ice frozen arctic glacier",
    "desert": "desert dune dunes sand sahara canyon mars",
    "autumn": "autumn fall october harvest orange",
    "green": "forest wood woods jungle spring green moss rainforest",
    "day": "day noon summer sunny blue beach island",
}
"""Light → words that call for it; the first that fits is taken, so that a forest at night is dark."""
_WATER = "sea ocean lake water river beach island coast bay fjord harbour harbor boat ship lighthouse"
_TREES = "forest tree trees wood woods pine pines jungle fir spruce taiga rainforest"
_PEAKS = "mountain mountains alps peak peaks summit cliff cliffs glacier fjord"
_PLANET = "space galaxy cosmos planet saturn mars alien"
_FOX = "fox foxes vixen"
_BIRDS = "bird birds gull gulls swallow crane heron sea coast"


@dataclass(frozen=True, slots=True)
class Scene:
    """All that decides how the picture looks; equal scenes and sizes give equal bytes."""

    palette: Palette
    key: str
    stars: bool = False
    water: bool = False
    trees: bool = False
    peaks: bool = False
    planet: bool = False
    fox: bool = False
    birds: bool = False

    def random(self, part: str) -> Random:
        """A source of its own for each part: to change one does not change the others."""
        return Random(f"{self.key}/{part}")  # noqa: S311 - art, not secrets


def imagine(prompt: PromptSpec) -> Scene:
    """Return the scene for a prompt and a seed. Words of the negative prompt stay out of it."""
    words = _words(prompt.text) - _words(prompt.negative_prompt or "")
    key = f"{prompt.text}\n{prompt.negative_prompt or ''}\n{prompt.seed}"
    dice = Random(key)  # noqa: S311 - art, not secrets
    light = next((name for name, calls in _LIGHTS.items() if words & _words(calls)), None)
    light = light or dice.choice(("sunset", "dawn", "night", "day", "desert", "autumn", "green"))
    named = words & _words(f"{_WATER} {_TREES} {_PEAKS}")
    return Scene(
        palette=_shifted(PALETTES[light], dice.uniform(-0.025, 0.025)),
        key=key,
        stars=light == "night",
        water=bool(words & _words(_WATER)) or (not named and light != "desert" and dice.random() < 0.4),
        trees=bool(words & _words(_TREES)) or (light == "green" and not named),
        peaks=bool(words & _words(_PEAKS)) or (light == "winter" and not named),
        planet=bool(words & _words(_PLANET)),
        fox=bool(words & _words(_FOX)),
        birds=not words & _words(_PLANET)
        and (bool(words & _words(_BIRDS)) or (light != "night" and dice.random() < 0.5)),
    )


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def _shifted(palette: Palette, angle: float) -> Palette:
    """The palette with its hues turned a little, so that no two sunsets are alike."""

    def shift(color: Color) -> Color:
        hue, light, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
        red, green, blue = colorsys.hls_to_rgb((hue + angle) % 1, light, saturation)
        return round(red * 255), round(green * 255), round(blue * 255)

    return Palette(tuple(map(shift, palette.sky)), shift(palette.light), shift(palette.far), shift(palette.near))
