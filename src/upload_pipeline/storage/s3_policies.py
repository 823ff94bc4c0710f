"""What each kind of process must be allowed in a bucket, and no more: policies for its user or role.

The rights below are what the code asks for; a test runs the service and the workers on a server that enforces these
very policies, and another sees that each right is used. `s3:ListBucket` stands without a condition: without it, or
with one on prefixes, S3 says "denied" of an object that is merely missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from upload_pipeline.storage.encryption import Encryption
from upload_pipeline.storage_address import Bucket

Process = Literal["api", "workers"]

GET, PUT, DELETE, ABORT = "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"

_PHOTOS = "-".join("?" * count for count in (8, 4, 4, 4, 12))
"""What keys of photos begin with: the id of their project, whatever it is."""

RIGHTS: Mapping[Process, Mapping[str, tuple[str, ...]]] = {
    # Takes uploads in (a move is a copy and a delete), hands them out, deletes documents and photos.
    "api": {
        "incoming": (GET, PUT, DELETE, ABORT),
        "raw": (GET, PUT, DELETE),
        "parsed": (GET, DELETE),
        _PHOTOS: (GET, PUT, DELETE),
    },
    # Read what was uploaded, keep what is made of it, remove what is deleted, refused or orphaned; put back what came
    # into use on its way out; say whose store it is.
    "workers": {
        "incoming": (GET, PUT, DELETE),
        "raw": (GET, PUT, DELETE),
        "parsed": (GET, PUT, DELETE, ABORT),
        "owner": (GET, PUT),
        _PHOTOS: (GET, PUT, DELETE, ABORT),
    },
}
"""Rights of each process by the first part of the keys. One that runs both, as `up` and `ingest` do, needs both."""


@dataclass(frozen=True, slots=True)
class Place:
    """A bucket as policies name it."""

    bucket: Bucket
    region: str
    encryption: Encryption

    @property
    def arn(self) -> str:
        """Of the bucket."""
        return f"arn:{arn_partition(self.region)}:s3:::{self.bucket.name}"


def arn_partition(region: str) -> str:
    """The part of an ARN that tells AWS's separate worlds apart."""
    for beginning, partition in (("cn-", "aws-cn"), ("us-gov-", "aws-us-gov")):
        if region.startswith(beginning):
            return partition
    return "aws"


def process_policy(process: Process, place: Place) -> dict[str, Any]:
    """The policy of the service or of the workers."""
    below = f"{place.bucket.prefix}/" if place.bucket.prefix else ""
    statements: list[dict[str, Any]] = [
        {"Sid": "List", "Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": place.arn}
    ]
    for name, actions in RIGHTS[process].items():
        resource = f"{place.arn}/{below}{name}/*"
        sid = "Photos" if name == _PHOTOS else name.title()
        statements.append({"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": resource})
    statements += _key_statements(place)
    return {"Version": "2012-10-17", "Statement": statements}


def owner_policy(place: Place, rights: tuple[str, ...]) -> dict[str, Any]:
    """The policy of whoever runs `storage setup`.

    Args:
        place: the bucket.
        rights: to read and write its configuration.
    """
    bucket = ("s3:CreateBucket", "s3:GetBucketLocation", *rights)
    below = f"{place.bucket.prefix}/" if place.bucket.prefix else ""
    probe = {
        "Sid": "Probe",
        "Effect": "Allow",
        "Action": [GET, PUT, DELETE],
        "Resource": f"{place.arn}/{below}incoming/*",
    }
    statements = [
        {"Sid": "Setup", "Effect": "Allow", "Action": list(bucket), "Resource": place.arn},
        probe,
        *_key_statements(place),
    ]
    return {"Version": "2012-10-17", "Statement": statements}


def _key_statements(place: Place) -> list[dict[str, Any]]:
    """What a key of the key service asks for: to write, and to read what was written, parts of an upload included."""
    key = place.encryption.kms_key_id
    if not key:  # the account's own key lets everybody of the account use it through S3
        return []
    statement: dict[str, Any] = {
        "Sid": "Key",
        "Effect": "Allow",
        "Action": ["kms:GenerateDataKey", "kms:Decrypt"],
        "Resource": key,
    }
    if not key.startswith("arn:"):
        keys = f"arn:{arn_partition(place.region)}:kms:{place.region}:*:key"
        if key.startswith("alias/"):
            statement["Resource"] = f"{keys}/*"
            statement["Condition"] = {"ForAnyValue:StringEquals": {"kms:ResourceAliases": key}}
        else:
            statement["Resource"] = f"{keys}/{key}"
    elif ":alias/" in key:
        statement["Resource"] = f"{key.rpartition(':')[0]}:key/*"
        statement["Condition"] = {"ForAnyValue:StringEquals": {"kms:ResourceAliases": key.rpartition(":")[2]}}
    return [statement]
