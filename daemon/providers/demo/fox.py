"""A fox that sits and looks at the light. Units are its height; it faces left."""

from daemon.providers.demo.brushes import Color, Point, circle, smooth

_FUR: Color = (222, 104, 38)
_SHADE: Color = (176, 72, 26)
_CREAM: Color = (250, 236, 214)
_DARK: Color = (52, 28, 26)

FOX: tuple[tuple[Color, list[Point]], ...] = (
    # the tail, around the body, and its tip
    (
        _SHADE,
        smooth(
            [
                (0.16, 0.80),
                (0.36, 0.74),
                (0.52, 0.82),
                (0.66, 0.80),
                (0.72, 0.88),
                (0.58, 0.99),
                (0.36, 1.0),
                (0.16, 0.98),
            ],
            closed=True,
        ),
    ),
    (_CREAM, smooth([(0.58, 0.81), (0.68, 0.76), (0.82, 0.72), (0.78, 0.86), (0.66, 0.95), (0.57, 0.92)], closed=True)),
    # the body, its leg, and the chest
    (
        _FUR,
        smooth(
            [
                (-0.10, 0.42),
                (0.02, 0.40),
                (0.16, 0.52),
                (0.27, 0.70),
                (0.30, 0.88),
                (0.24, 1.0),
                (0.04, 1.0),
                (-0.14, 1.0),
                (-0.13, 0.80),
                (-0.17, 0.60),
            ],
            closed=True,
        ),
    ),
    (_SHADE, smooth([(0.08, 0.80), (0.17, 0.74), (0.26, 0.84), (0.25, 1.0), (0.05, 1.0), (0.12, 0.92)], closed=True)),
    (
        _CREAM,
        smooth([(-0.17, 0.48), (-0.06, 0.46), (-0.03, 0.60), (-0.08, 0.76), (-0.14, 0.80), (-0.18, 0.62)], closed=True),
    ),
    (_DARK, [(-0.14, 0.86), (-0.05, 0.86), (-0.03, 1.0), (-0.16, 1.0)]),
    # the ears, the head, the cheek, the eye, the nose
    (_DARK, [(-0.12, 0.20), (-0.10, -0.02), (0.02, 0.16)]),
    (_FUR, [(-0.09, 0.20), (-0.065, 0.05), (0.03, 0.18)]),
    (_DARK, [(0.0, 0.20), (0.10, -0.02), (0.13, 0.24)]),
    (_FUR, [(0.02, 0.21), (0.09, 0.06), (0.115, 0.25)]),
    (
        _FUR,
        smooth(
            [
                (-0.38, 0.37),
                (-0.22, 0.26),
                (-0.12, 0.16),
                (0.06, 0.16),
                (0.15, 0.28),
                (0.13, 0.42),
                (0.02, 0.50),
                (-0.12, 0.48),
                (-0.27, 0.42),
            ],
            closed=True,
        ),
    ),
    (
        _CREAM,
        smooth(
            [(-0.37, 0.38), (-0.22, 0.35), (-0.08, 0.37), (0.04, 0.44), (0.0, 0.50), (-0.12, 0.49), (-0.27, 0.43)],
            closed=True,
        ),
    ),
    (_DARK, circle((-0.10, 0.29), 0.022)),
    (_DARK, circle((-0.37, 0.375), 0.028)),
)
"""Colour and outline, back to front."""
