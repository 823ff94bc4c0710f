"""Makes the store of the settings as it should be, or says in which parts it is not; whatever kind of store it is."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upload_pipeline.errors import PipelineError
from upload_pipeline.storage import anonymous
from upload_pipeline.storage.bucket_part import Wanted
from upload_pipeline.storage.configured import configured_encryption, configured_store
from upload_pipeline.storage.free_space import free_bytes
from upload_pipeline.storage.local_tree import DIRECTORY_MODE, make_root
from upload_pipeline.storage.s3 import bucket_region
from upload_pipeline.storage.s3_admin import open_admin
from upload_pipeline.storage.s3_policies import RIGHTS, Place, owner_policy, process_policy
from upload_pipeline.storage.s3_setup import PARTS, look_at_bucket
from upload_pipeline.storage.store_findings import StorePart, all_well
from upload_pipeline.storage_address import (
    AzureContainer,
    Bucket,
    Directory,
    GoogleBucket,
    SupabaseBucket,
    parse_storage_url,
)

if TYPE_CHECKING:
    from upload_pipeline.settings import Settings

USE_SECONDS = 60.0
"""Bound of the look whether the store can be written."""

_WHERE_TO_LOOK = {
    GoogleBucket: "See `gcloud storage buckets describe gs://{name}`.",
    AzureContainer: "See `az storage container show --name {name}`, and the account's settings.",
    SupabaseBucket: "See Storage in the project's dashboard: the bucket {name}, and its policies.",
}

_NOT_OF_SUPABASE = frozenset({"encryption", "versioning", "life cycle"})
"""What Supabase Storage lets nobody configure."""


async def look_at_store(settings: Settings, *, mend: bool) -> list[StorePart]:
    """Every part of the store.

    Args:
        settings: name the store and how it is to be.
        mend: whether what is missing is made. A second call then changes nothing.

    Raises:
        PipelineError: `SETTING_INVALID`, or a bucket's server does not answer or does not take the keys.
    """
    address = parse_storage_url(settings.effective_storage_url)
    if isinstance(address, Directory):
        parts = await asyncio.to_thread(_look_at_directory, address.path, settings.min_free_bytes, mend=mend)
        if all_well(parts[:1]):
            parts += [StorePart(part.name, "not offered", "a directory has no such configuration") for part in PARTS]
    elif isinstance(address, Bucket):
        async with open_admin(address) as admin:
            wanted = Wanted(
                address,
                admin.region,
                admin.tls,
                configured_encryption(settings),
                settings.cors_origins,
                settings.storage_raw_days,
                settings.storage_version_days,
            )
            parts = await look_at_bucket(admin, wanted, mend=mend)
    else:
        return await _look_at_other(settings, address)
    if all_well(parts[:1]):
        parts.append(await _use(settings))
    return parts


async def _look_at_other(
    settings: Settings, address: GoogleBucket | AzureContainer | SupabaseBucket
) -> list[StorePart]:
    """Of a store whose configuration nobody here can read or make: what using it shows."""
    use = await _use(settings)
    hint = _WHERE_TO_LOOK[type(address)].format(name=address.name)
    parts = []
    for part in PARTS:
        if isinstance(address, SupabaseBucket) and part.name in _NOT_OF_SUPABASE:
            parts.append(StorePart(part.name, "not offered", "Supabase Storage has no such configuration"))
        elif part.name == anonymous.PART and use.well:
            parts.append(await _public_access(settings, address))
        else:
            parts.append(StorePart(part.name, "not looked at", f"this command knows S3 alone. {hint}"))
    return [*parts, use]


async def _public_access(settings: Settings, address: GoogleBucket | AzureContainer | SupabaseBucket) -> StorePart:
    store = configured_store(settings)
    try:
        return await anonymous.look_without_credentials(store, address)
    except PipelineError as error:
        return StorePart(anonymous.PART, "not looked at", f"{error.code}: {error.message}")
    finally:
        await store.close()


def store_policies(settings: Settings) -> dict[str, Any] | None:
    """The least policies of `api` and `workers`, and that of whoever runs the setup, by name.

    Returns:
        None where the store has no such policies.

    Raises:
        PipelineError: `SETTING_INVALID`.
    """
    address = parse_storage_url(settings.effective_storage_url)
    if not isinstance(address, Bucket):
        return None
    place = Place(address, bucket_region(), configured_encryption(settings))
    rights = tuple(dict.fromkeys(right for part in PARTS for right in part.rights if right))
    policies: dict[str, Any] = {process: process_policy(process, place) for process in RIGHTS}
    return policies | {"setup": owner_policy(place, rights)}


async def _use(settings: Settings) -> StorePart:
    try:
        async with asyncio.timeout(USE_SECONDS):
            await configured_store(settings).check_writable()
    except PipelineError as error:
        return StorePart("use", "missing", f"{error.code}: {error.message}")
    except TimeoutError:
        return StorePart("use", "missing", f"no answer within {USE_SECONDS:g} s. Try again.")
    return StorePart("use", "ok", "an object was written, read back and removed")


def _look_at_directory(root: Path, min_free_bytes: int, *, mend: bool) -> list[StorePart]:
    made = False
    try:
        if mend and not root.exists():
            make_root(root)
            made = True
        status = root.stat()
    except FileNotFoundError:
        remedy = "Run `upload-pipeline storage setup`, or correct STORAGE_URL."
        return [StorePart("directory", "missing", f"{root} does not exist. {remedy}")]
    except OSError as error:
        remedy = "Give this user the right to make it, or correct STORAGE_URL."
        return [StorePart("directory", "denied", f"{root}: {error.strerror}. {remedy}")]
    return [
        StorePart("directory", "changed" if made else "ok", f"{root}{' made' if made else ''}"),
        _permissions(root, status, mend=mend),
        _free_space(root, min_free_bytes),
    ]


def _permissions(root: Path, status: os.stat_result, *, mend: bool) -> StorePart:
    mode = stat.S_IMODE(status.st_mode)
    if not mode & ~DIRECTORY_MODE:
        return StorePart("permissions", "ok", f"{mode:04o}: for its owner alone")
    if status.st_uid != os.geteuid():
        return StorePart("permissions", "denied", f"{mode:04o}, and another user owns it. Run `chmod 700` as that one.")
    if not mend:
        return StorePart("permissions", "missing", f"{mode:04o} lets others in. Run `upload-pipeline storage setup`.")
    root.chmod(DIRECTORY_MODE)
    return StorePart("permissions", "changed", f"{DIRECTORY_MODE:04o}: for its owner alone")


def _free_space(root: Path, floor: int) -> StorePart:
    free = free_bytes(root)
    if free < floor:
        message = f"{free} bytes are free, fewer than MIN_FREE_BYTES={floor}. Free some: uploads are refused."
        return StorePart("free space", "missing", message)
    return StorePart("free space", "ok", f"{free // 1024**2} MB, of which {floor // 1024**2} MB must stay free")
