"""List Midjourney's versions, and the flags that select them.

There is no price: an image is paid for by the subscription's hours. What one costs, IMAGE_JOBS_MIDJOURNEY_PRICE may say.
"""

import re

from daemon.providers import Model

_SOURCE = "docs.midjourney.com, Version"
_RATIOS = ("1:1", "16:9", "9:16", "3:2", "2:3", "4:3", "3:4", "5:4", "4:5", "21:9")
"""The usual ones, for menus: any is taken."""
_VERSION = re.compile(r"(?P<family>v|niji-)(?P<number>[1-9]\d?(\.\d)?)")


def _current(name: str) -> Model:
    return Model(
        name,
        typical_seconds=60,
        ratios=_RATIOS,
        seed=True,
        negative_prompt=True,
        previous_image=True,
        previews=True,
        source=_SOURCE,
    )


MODELS = (
    _current("v7"),  # the first is the default of plain `midjourney`
    _current("v6"),
    _current("niji-6"),
)


def version_flag(model: str) -> str | None:
    """Return the flag of a model, `--v 6` or `--niji 6`; None for no version, which must not get into the prompt."""
    found = _VERSION.fullmatch(model)
    return found and f"--{found['family'].rstrip('-')} {found['number']}"


def is_niji(model: str) -> bool:
    """Return whether a model belongs to the second of the two bots."""
    return model.startswith("niji-")
