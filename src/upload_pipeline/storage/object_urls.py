"""What an object is called outside this service: a name that stays, and a permission to nobody."""

from __future__ import annotations

LOCAL = "local"
"""The scheme of objects in a directory: which one is nobody's business but the operator's."""


def object_url(storage_url: str, key: str) -> str:
    """The object's own URL: `s3://bucket/prefix/key`; `local:///key` where the store is a directory.

    It is the same for as long as the object is kept where it is. To fetch the object one needs rights in the store, or
    a signed URL.

    Args:
        storage_url: of the store, one that `parse_storage_url` takes.
        key: of the object.
    """
    if storage_url.startswith("file://"):
        return f"{LOCAL}:///{key}"
    return f"{storage_url.rstrip('/')}/{key}"
