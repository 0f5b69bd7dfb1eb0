"""Where a run's pictures lie in the bucket: all below its workflow's id."""


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
