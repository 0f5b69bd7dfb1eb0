"""Build the keys of a run's objects in the bucket: all are below its workflow's id."""

from pathlib import PurePosixPath


def object_key(workflow_id: object, run_id: str, extension: str) -> str:
    """Return the key of a run's image."""
    return f"{workflow_id}/{run_id}.{extension}"


def extra_key(workflow_id: object, run_id: str, number: int, extension: str) -> str:
    """Return the key of a further image of the run; they are counted from 1."""
    return object_key(workflow_id, run_id, f"{number}.{extension}")


def thumbnail_key(workflow_id: object, run_id: str) -> str:
    """Return the key of the run's thumbnail."""
    return object_key(workflow_id, run_id, "thumb.webp")


def preview_key(workflow_id: object, run_id: str) -> str:
    """Return the key of the run's latest preview."""
    return object_key(workflow_id, run_id, "preview.webp")


def conversation_key(workflow_id: object, run_id: str) -> str:
    """Return the key of the run's conversation, in the other bucket."""
    return object_key(workflow_id, run_id, "json")


def kept_key(workflow_id: object, run_id: str, claim: int) -> str:
    """Return the key of what came under a claim and cannot be decoded, in a bucket of its own."""
    return f"{workflow_id}/{run_id}-{claim}.bin"


def copy_key(key: str) -> str:
    """Return the key of a copy of a run's object, in the bucket of what is kept."""
    folder, _, name = key.rpartition("/")
    run_id, _, extension = name.partition(".")
    return f"{folder}/{run_id}-copy.{extension}"


def conversation_key_of(image_key: str, workflow_id: object) -> str | None:
    """Return the key of the conversation that made an image, by that image's key.

    None for an image of another workflow, whose conversations are private, and for a key that is no run's image.
    """
    path = PurePosixPath(image_key)
    if len(path.parts) != 2 or path.parts[0] != str(workflow_id) or len(path.suffixes) != 1:
        return None
    return conversation_key(workflow_id, path.stem)
