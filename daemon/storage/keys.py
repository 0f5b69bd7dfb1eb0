"""Where a run's pictures lie in the bucket: all below its workflow's id."""

from pathlib import PurePosixPath


def object_key(workflow_id: object, run_id: str, extension: str) -> str:
    """Where a run's image lies in the bucket."""
    return f"{workflow_id}/{run_id}.{extension}"


def extra_key(workflow_id: object, run_id: str, number: int, extension: str) -> str:
    """Where a further picture of it lies; they are counted from 1."""
    return object_key(workflow_id, run_id, f"{number}.{extension}")


def thumbnail_key(workflow_id: object, run_id: str) -> str:
    """Where its thumbnail lies."""
    return object_key(workflow_id, run_id, "thumb.webp")


def preview_key(workflow_id: object, run_id: str) -> str:
    """Where the latest picture of it lies while it is forming."""
    return object_key(workflow_id, run_id, "preview.webp")


def context_key(workflow_id: object, run_id: str) -> str:
    """Where what a provider said beside its image lies, in the other bucket."""
    return object_key(workflow_id, run_id, "json")


def context_of(image_key: str, workflow_id: object) -> str | None:
    """The context of an image, by that image's key; None if it is another workflow's, which is none of our business, or
    none of a run's images."""
    path = PurePosixPath(image_key)
    if len(path.parts) != 2 or path.parts[0] != str(workflow_id) or len(path.suffixes) != 1:
        return None
    return context_key(workflow_id, path.stem)
