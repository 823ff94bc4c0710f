"""Which rights a request to S3 needs, and whether a policy gives them.

moto can enforce policies, but asks for nothing where a URL is presigned, nor for the source of a copy, and for one
object of many where several are deleted. So the rights are told here, after the service authorization reference and
the "Permissions" of each operation in S3's API reference; whether a policy gives one is decided by moto's evaluator.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote

_CONFIGURATIONS = {
    "acl": "BucketAcl",
    "cors": "BucketCORS",
    "encryption": "EncryptionConfiguration",
    "lifecycle": "LifecycleConfiguration",
    "location": "BucketLocation",
    "policy": "BucketPolicy",
    "policyStatus": "BucketPolicyStatus",
    "publicAccessBlock": "BucketPublicAccessBlock",
    "versioning": "BucketVersioning",
}

Right = tuple[str, str]
"""An action and the ARN that it is done to."""


@dataclass(slots=True)
class Rights:
    """The policies of access keys, which rights they have used and which they lacked."""

    policies: dict[str, str] = field(default_factory=dict)
    used: dict[str, set[Right]] = field(default_factory=dict)
    lacked: dict[str, set[Right]] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def give(self, key_id: str, policy: str) -> None:
        with self._turn:
            self.policies[key_id] = policy
            self.used[key_id], self.lacked[key_id] = set(), set()

    def ask(self, key_id: str, needed: list[Right]) -> bool:
        """Whether the key has all rights that are needed."""
        from moto.iam.access_control import IAMPolicy, PermissionResult

        # moto takes what is no * for a regular expression, in which ? means something else than in a policy.
        policy = IAMPolicy(self.policies[key_id].replace("?", "."))
        lacked = {right for right in needed if policy.is_action_permitted(*right) is not PermissionResult.PERMITTED}
        with self._turn:
            self.used[key_id] |= set(needed) - lacked
            self.lacked[key_id] |= lacked
        return not lacked

    def told(self, key_id: str) -> bytes:
        return json.dumps({"used": sorted(self.used[key_id]), "lacked": sorted(self.lacked[key_id])}).encode()


def needed(method: str, path: str, query_string: str, headers: Mapping[str, str], body: bytes) -> list[Right]:
    """What a request needs; `headers` by lower-case name."""
    bucket, _, key = unquote(path).lstrip("/").partition("/")
    query: dict[str, Any] = dict(parse_qsl(query_string, keep_blank_values=True))
    arn = f"arn:aws:s3:::{bucket}"
    if key:
        if method == "DELETE" and "uploadId" in query:
            return [("s3:AbortMultipartUpload", f"{arn}/{key}")]
        action = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "DELETE": "s3:DeleteObject"}.get(
            method, "s3:PutObject"
        )
        rights = [(action, f"{arn}/{key}")]
        if source := unquote(headers.get("x-amz-copy-source", "")).lstrip("/"):
            rights.append(("s3:GetObject", f"arn:aws:s3:::{source}"))
        return rights
    if method == "POST" and "delete" in query:
        return [("s3:DeleteObject", f"{arn}/{name}") for name in re.findall(r"<Key>([^<]+)</Key>", body.decode())]
    for subresource, name in _CONFIGURATIONS.items():
        if subresource in query:
            return [(f"s3:{'Get' if method == 'GET' else 'Put'}{name}", arn)]
    return [("s3:CreateBucket" if method == "PUT" else "s3:ListBucket", arn)]
