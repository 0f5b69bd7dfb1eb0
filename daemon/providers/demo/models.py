"""List the painter's one model."""

from daemon.providers import Model

MODELS = (
    Model(
        "painter",
        price=0.0,  # known to be free
        typical_seconds=1.5,
        sizes=("1024x1024", "1536x1024", "1024x1536", "1792x1024", "512x512"),
        ratios=("1:1", "16:9", "9:16", "3:2", "2:3", "4:3", "3:4", "21:9"),
        seed=True,
        negative_prompt=True,
        previous_image=True,
        previews=True,
        source="daemon/providers/demo/models.py",
    ),
)
