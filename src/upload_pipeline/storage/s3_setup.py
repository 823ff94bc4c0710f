"""Makes a bucket as it is wanted, or says in which parts it is not."""

from __future__ import annotations

from upload_pipeline.storage.bucket_access import ACCESS
from upload_pipeline.storage.bucket_keeping import KEEPING
from upload_pipeline.storage.bucket_part import Part, Wanted, known
from upload_pipeline.storage.s3_admin import BucketAdmin, NotOffered, Refused
from upload_pipeline.storage.s3_failures import MISSING_BUCKET
from upload_pipeline.storage.s3_xml import node, render
from upload_pipeline.storage.store_findings import StorePart

PARTS = (*ACCESS, *KEEPING)
"""Of a bucket's configuration."""

_LOCATION = "LocationConstraint"

_FIRST_REGION = "us-east-1"
"""The one region whose name S3 does not want to hear when a bucket is made there, nor gives back."""


async def look_at_bucket(admin: BucketAdmin, wanted: Wanted, *, mend: bool) -> list[StorePart]:
    """Every part of the bucket's configuration.

    Args:
        admin: the bucket.
        wanted: how it is to be.
        mend: whether what is missing is made, the bucket itself included. What is well is left alone, so a second
            call changes nothing.

    Raises:
        PipelineError: the server does not answer, or does not take the keys.
    """
    bucket = await _bucket(admin, wanted, mend=mend)
    if not bucket.well:
        return [bucket]
    return [bucket, *[await _part(part, admin, wanted, mend=mend) for part in PARTS]]


async def _bucket(admin: BucketAdmin, wanted: Wanted, *, mend: bool) -> StorePart:
    name = admin.bucket.name
    try:
        found = await admin.read("location", frozenset({MISSING_BUCKET}))
        if found is not None:
            return StorePart("bucket", "ok", f"{name} exists in {known(found, _LOCATION).text or _FIRST_REGION}")
        if not mend:
            remedy = "Run `upload-pipeline storage setup`, or correct STORAGE_URL."
            return StorePart("bucket", "missing", f"{name} does not exist. {remedy}")
        body = b""
        if wanted.region != _FIRST_REGION:
            body = render(node("CreateBucketConfiguration", node("LocationConstraint", wanted.region)))
        await admin.write("", body)
    except NotOffered:
        return StorePart("bucket", "ok", f"{name}: the server does not tell where it is")
    except ValueError as error:
        remedy = "Let AWS_ENDPOINT_URL name a server of buckets."
        return StorePart("bucket", "missing", f"the answer of {admin.endpoint} cannot be read ({error}). {remedy}")
    except Refused as error:
        if error.code == "BucketAlreadyOwnedByYou":  # another setup was faster
            return StorePart("bucket", "ok", f"{name} exists in {wanted.region}")
        return _refused("bucket", error, "s3:CreateBucket" if mend else "s3:GetBucketLocation")
    return StorePart("bucket", "changed", f"{name} made in {wanted.region}")


async def _part(part: Part, admin: BucketAdmin, wanted: Wanted, *, mend: bool) -> StorePart:
    right = part.rights[0]
    try:
        found = await admin.read(part.subresource, part.absent)
        lacks = part.lacks(found, wanted)
        if not lacks:
            return StorePart(part.name, "ok", part.fine(wanted))
        if not mend or part.made is None:
            remedy = "" if part.made is None else ". Run `upload-pipeline storage setup`"
            return StorePart(part.name, "missing", f"{lacks}{remedy}.")
        right = part.rights[1]
        body, headers = part.made(found, wanted)
        await admin.write(part.subresource, body, headers, method="PUT" if body or headers else "DELETE")
        if still := part.lacks(await admin.read(part.subresource, part.absent), wanted):
            return StorePart(part.name, "missing", f"the server took the change and did not keep it: {still}.")
    except NotOffered:
        return StorePart(part.name, "not offered", "this server has no such configuration")
    except ValueError as error:
        # Nothing is known of it then, and nothing is written over it.
        remedy = "Look at it with the tools of the server."
        return StorePart(part.name, "missing", f"what the server says of it cannot be read ({error}). {remedy}")
    except Refused as error:
        return _refused(part.name, error, right)
    return StorePart(part.name, "changed", part.fine(wanted))


def _refused(name: str, error: Refused, right: str) -> StorePart:
    if error.denied:
        return StorePart(name, "denied", f"these keys lack {right}. Grant it, or use the keys of the bucket's owner.")
    return StorePart(name, "missing", f"the server refused it: {error.code}: {error.message.rstrip('.')}.")
