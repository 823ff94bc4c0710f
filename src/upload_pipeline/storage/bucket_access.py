"""Who is let into a bucket: nobody without keys, and nobody without TLS."""

from __future__ import annotations

import json
from typing import Any

from upload_pipeline.storage.bucket_part import Document, Part, Wanted, known
from upload_pipeline.storage.s3_policies import arn_partition
from upload_pipeline.storage.s3_xml import node, render

TLS_SID = "UploadPipelineTlsOnly"

_EVERYBODY = ("/groups/global/AllUsers", "/groups/global/AuthenticatedUsers")
_BLOCKS = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")


def _acl_lacks(found: bytes | None, wanted: Wanted) -> str:
    grants = [
        grant for list_ in known(found, "AccessControlPolicy").all("AccessControlList") for grant in list_.all("Grant")
    ]
    if any(grant.value("Grantee", "URI").endswith(_EVERYBODY) for grant in grants):
        return "its access list lets everybody in"
    return ""


def _acl_made(found: bytes | None, wanted: Wanted) -> Document:
    return b"", {"x-amz-acl": "private"}


def _policy_lacks(found: bytes | None, wanted: Wanted) -> str:
    if known(found, "PolicyStatus").value("IsPublic").lower() == "true":
        return "its policy lets everybody in. Take the statement with the principal * out of the bucket's policy"
    return ""


def _block_lacks(found: bytes | None, wanted: Wanted) -> str:
    blocks = known(found, "PublicAccessBlockConfiguration")
    missing = [name for name in _BLOCKS if blocks.value(name).lower() != "true"]
    return f"{', '.join(missing)} not set" if missing else ""


def _block_made(found: bytes | None, wanted: Wanted) -> Document:
    return render(node("PublicAccessBlockConfiguration", *(node(name, "true") for name in _BLOCKS))), {}


def _tls_lacks(found: bytes | None, wanted: Wanted) -> str:
    if not wanted.tls:
        return ""
    statements = [] if found is None else _statements(found)
    covered = {_everything(wanted), _everything(wanted) + "/*"}
    for statement in statements:
        if (
            statement.get("Effect") == "Deny"
            and _is_without_tls(statement.get("Condition"))
            and statement.get("Principal") in ("*", {"AWS": "*"})
            and "s3:*" in _listed(statement.get("Action"))
            and covered <= set(_listed(statement.get("Resource")))
        ):
            return ""
    return "requests without TLS are let in"


def _is_without_tls(condition: Any) -> bool:
    """Whether it is met by every request without TLS: a further condition would let others of them in."""
    if not isinstance(condition, dict) or set(condition) != {"Bool"} or not isinstance(condition["Bool"], dict):
        return False
    asked = {
        str(name).lower(): [str(one).lower() for one in _listed(value)] for name, value in condition["Bool"].items()
    }
    return asked == {"aws:securetransport": ["false"]}


def _tls_made(found: bytes | None, wanted: Wanted) -> Document:
    others = [] if found is None else [one for one in _statements(found) if one.get("Sid") != TLS_SID]
    own = {
        "Sid": TLS_SID,
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": [_everything(wanted), _everything(wanted) + "/*"],
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }
    policy = {"Version": "2012-10-17", "Statement": [*others, own]}
    return json.dumps(policy).encode(), {"content-type": "application/json"}


def _statements(found: bytes) -> list[dict[str, Any]]:
    policy = json.loads(found)
    if not isinstance(policy, dict):
        raise ValueError("the policy is no object")
    statements = _listed(policy.get("Statement", []))
    if not all(isinstance(statement, dict) for statement in statements):
        raise ValueError("a statement of the policy is no object")
    return statements


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _everything(wanted: Wanted) -> str:
    return f"arn:{arn_partition(wanted.region)}:s3:::{wanted.bucket.name}"


ACCESS = (
    Part(
        "access list",
        "acl",
        frozenset({"AccessControlListNotSupported"}),
        ("s3:GetBucketAcl", "s3:PutBucketAcl"),
        _acl_lacks,
        _acl_made,
        lambda wanted: "lets nobody else in",
    ),
    Part(
        "policy",
        "policyStatus",
        frozenset({"NoSuchBucketPolicy"}),
        ("s3:GetBucketPolicyStatus", ""),
        _policy_lacks,
        None,
        lambda wanted: "lets nobody in without keys",
    ),
    Part(
        "public access",
        "publicAccessBlock",
        frozenset({"NoSuchPublicAccessBlockConfiguration"}),
        ("s3:GetBucketPublicAccessBlock", "s3:PutBucketPublicAccessBlock"),
        _block_lacks,
        _block_made,
        lambda wanted: "blocked",
    ),
    Part(
        "TLS",
        "policy",
        frozenset({"NoSuchBucketPolicy"}),
        ("s3:GetBucketPolicy", "s3:PutBucketPolicy"),
        _tls_lacks,
        _tls_made,
        lambda wanted: "nothing else is let in" if wanted.tls else "not asked for: the server is reached by http://",
    ),
)
"""The parts, in the order in which they are looked at and made."""
