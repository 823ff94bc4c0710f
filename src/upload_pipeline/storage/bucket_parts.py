"""How a bucket on S3 is to be set up, part by part: what each lacks, and the document that gives it that.

Documents are those of S3's API reference (PutBucketEncryption, PutBucketLifecycleConfiguration, ...). S3 replaces a
list of rules as a whole, so rules that are not ours, which their ids tell, are sent back as they came.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from upload_pipeline.storage.encryption import ALGORITHM_HEADER, KEY_HEADER, Encryption
from upload_pipeline.storage.s3_policies import arn_partition
from upload_pipeline.storage.s3_xml import Node, node, parse, render
from upload_pipeline.storage_address import Bucket

OWN = "upload-pipeline"
"""What the ids of our rules begin with; the prefix of the storage URL follows, for several may share a bucket."""

TLS_SID = "UploadPipelineTlsOnly"

ABORT_PARTS_DAYS = 1
"""After which parts of an upload that never ended are removed; S3 counts in days, and no upload of ours takes one."""

CORS_SECONDS = 3600
"""For which a browser remembers the bucket's consent."""

_EVERYBODY = ("/groups/global/AllUsers", "/groups/global/AuthenticatedUsers")
_BLOCKS = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
_SIGNED_HEADERS = ("content-type", "if-none-match", "x-amz-checksum-sha256", ALGORITHM_HEADER, KEY_HEADER)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the bucket is to be.

    Attributes:
        bucket: which, and the prefix that is ours.
        region: where it is.
        tls: whether its server is reached by TLS.
        encryption: that writes ask for.
        origins: of web pages that send files to it.
        raw_days: after which files as they were uploaded are removed; 0: never.
        version_days: after which replaced and deleted objects are gone for good.
    """

    bucket: Bucket
    region: str
    tls: bool
    encryption: Encryption
    origins: tuple[str, ...]
    raw_days: int
    version_days: int

    @property
    def own(self) -> str:
        """What the ids of rules for this prefix begin with."""
        return f"{OWN} {self.bucket.prefix}".strip()

    @property
    def below(self) -> str:
        """What every key of ours begins with in the bucket."""
        return f"{self.bucket.prefix}/" if self.bucket.prefix else ""


@dataclass(frozen=True, slots=True)
class Part:
    """One configuration of a bucket.

    Attributes:
        name: for people.
        subresource: of the requests.
        absent: the codes by which a server says that it is not set.
        rights: to read it and to write it, as policies call them.
        lacks: what is missing, as the end of a sentence, and empty where nothing is; given what the server has (None:
            not set).
        made: what to write: the body, and headers. None where nobody can mend it from here.
        fine: what it is like when nothing is missing.
    """

    name: str
    subresource: str
    absent: frozenset[str]
    rights: tuple[str, str]
    lacks: Callable[[bytes | None, Wanted], str]
    made: Callable[[bytes | None, Wanted], tuple[bytes, Mapping[str, str]]] | None
    fine: Callable[[Wanted], str]


# --- nobody else reads it


def _acl_lacks(found: bytes | None, wanted: Wanted) -> str:
    grants = (
        []
        if found is None
        else [grant for list_ in _known(found).all("AccessControlList") for grant in list_.all("Grant")]
    )
    if any(grant.value("Grantee", "URI").endswith(_EVERYBODY) for grant in grants):
        return "its access list lets everybody in"
    return ""


def _acl_made(found: bytes | None, wanted: Wanted) -> tuple[bytes, Mapping[str, str]]:
    return b"", {"x-amz-acl": "private"}


def _policy_lacks(found: bytes | None, wanted: Wanted) -> str:
    if found is not None and _known(found).value("IsPublic").lower() == "true":
        return "its policy lets everybody in. Take the statement with the principal * out of the bucket's policy"
    return ""


def _block_lacks(found: bytes | None, wanted: Wanted) -> str:
    blocks = Node("") if found is None else _known(found)
    missing = [name for name in _BLOCKS if blocks.value(name).lower() != "true"]
    return f"{', '.join(missing)} not set" if missing else ""


def _block_made(found: bytes | None, wanted: Wanted) -> tuple[bytes, Mapping[str, str]]:
    return render(node("PublicAccessBlockConfiguration", *(node(name, "true") for name in _BLOCKS))), {}


def _tls_lacks(found: bytes | None, wanted: Wanted) -> str:
    if not wanted.tls:
        return ""
    statements = [] if found is None else _statements(found)
    covered = {_everything(wanted), _everything(wanted) + "/*"}
    for statement in statements:
        condition = statement.get("Condition", {}).get("Bool", {}).get("aws:SecureTransport")
        if (
            statement.get("Effect") == "Deny"
            and str(condition).lower() == "false"
            and statement.get("Principal") in ("*", {"AWS": "*"})
            and "s3:*" in _listed(statement.get("Action"))
            and covered <= set(_listed(statement.get("Resource")))
        ):
            return ""
    return "requests without TLS are let in"


def _tls_made(found: bytes | None, wanted: Wanted) -> tuple[bytes, Mapping[str, str]]:
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


# --- what happens to the bytes


def _encryption_lacks(found: bytes | None, wanted: Wanted) -> str:
    algorithm = wanted.encryption.algorithm
    if algorithm is None:
        return ""
    path = ("Rule", "ApplyServerSideEncryptionByDefault")
    default = Node("") if found is None else _known(found)
    given, key = default.value(*path, "SSEAlgorithm"), default.value(*path, "KMSMasterKeyID")
    # Keys of the key service are more than AES-256 with keys of S3's own, never less.
    if given != algorithm and not (algorithm == "AES256" and given.startswith("aws:kms")):
        return f"objects are kept with {given or 'no encryption'} by default, not with {algorithm}"
    named = wanted.encryption.kms_key_id
    if named and key != named and not key.endswith(f"/{named}"):
        return f"the default key is {key or 'the account’s own'}, not {named}"
    return ""


def _encryption_made(found: bytes | None, wanted: Wanted) -> tuple[bytes, Mapping[str, str]]:
    default = [node("SSEAlgorithm", wanted.encryption.algorithm or "")]
    more = []
    if wanted.encryption.kms_key_id:
        default.append(node("KMSMasterKeyID", wanted.encryption.kms_key_id))
    if wanted.encryption.kind == "kms":
        more.append(node("BucketKeyEnabled", "true"))
    rule = node("Rule", node("ApplyServerSideEncryptionByDefault", *default), *more)
    return render(node("ServerSideEncryptionConfiguration", rule)), {}


def _versioning_lacks(found: bytes | None, wanted: Wanted) -> str:
    status = "" if found is None else _known(found).value("Status")
    return "" if status == "Enabled" else "what is replaced or deleted by mistake is gone at once"


def _versioning_made(found: bytes | None, wanted: Wanted) -> tuple[bytes, Mapping[str, str]]:
    return render(node("VersioningConfiguration", node("Status", "Enabled"))), {}


def _life_cycle_lacks(found: bytes | None, wanted: Wanted) -> str:
    given = [] if found is None else _known(found).all("Rule")
    facts = {rule.value("ID"): rule.facts() for rule in given}
    rules = {rule.value("ID"): rule for rule in _rules(wanted)}
    missing = [name for name, rule in rules.items() if facts.get(name) != rule.facts()]
    past = [name for name in facts if _is_own(name, wanted) and name not in rules]
    told = [f"no such rule as {name!r}" for name in missing] + [f"{name!r} is not wanted any more" for name in past]
    return "; ".join(told)


def _life_cycle_made(found: bytes | None, wanted: Wanted) -> tuple[bytes, Mapping[str, str]]:
    given = () if found is None else parse(found).children
    others = [child for child in given if child.name == "Rule" and not _is_own(child.value("ID"), wanted)]
    return render(node("LifecycleConfiguration", *others, *_rules(wanted))), {}


def _rules(wanted: Wanted) -> list[Node]:
    everything = node("Filter", node("Prefix", wanted.below))
    rules = [
        node(
            "Rule",
            node("ID", f"{wanted.own}: parts"),
            everything,
            node("Status", "Enabled"),
            node("AbortIncompleteMultipartUpload", node("DaysAfterInitiation", ABORT_PARTS_DAYS)),
        ),
        node(
            "Rule",
            node("ID", f"{wanted.own}: versions"),
            everything,
            node("Status", "Enabled"),
            node("Expiration", node("ExpiredObjectDeleteMarker", "true")),
            node("NoncurrentVersionExpiration", node("NoncurrentDays", wanted.version_days)),
        ),
    ]
    if wanted.raw_days:
        rules.append(
            node(
                "Rule",
                node("ID", f"{wanted.own}: raw"),
                node("Filter", node("Prefix", f"{wanted.below}raw/")),
                node("Status", "Enabled"),
                node("Expiration", node("Days", wanted.raw_days)),
            )
        )
    return rules


def _is_own(rule_id: str, wanted: Wanted) -> bool:
    return rule_id in {f"{wanted.own}: {kind}" for kind in ("parts", "versions", "raw")}


# --- who sends to it from a web page


def _cors_lacks(found: bytes | None, wanted: Wanted) -> str:
    given = [] if found is None else _known(found).all("CORSRule")
    own = [rule.facts() for rule in given if rule.value("ID") == wanted.own]
    if not wanted.origins:
        return "web pages are let in that CORS_ORIGINS does not name" if own else ""
    if own != [_cors_rule(wanted).facts()]:
        return f"pages of {', '.join(wanted.origins)} cannot send files to it"
    return ""


def _cors_made(found: bytes | None, wanted: Wanted) -> tuple[bytes, Mapping[str, str]]:
    given = () if found is None else parse(found).children
    others = [child for child in given if child.name == "CORSRule" and child.value("ID") != wanted.own]
    rules = [*others, *([_cors_rule(wanted)] if wanted.origins else [])]
    # A configuration without a rule is none: it is deleted instead.
    return (render(node("CORSConfiguration", *rules)) if rules else b""), {}


def _cors_rule(wanted: Wanted) -> Node:
    return node(
        "CORSRule",
        node("ID", wanted.own),
        *(node("AllowedOrigin", origin) for origin in wanted.origins),
        *(node("AllowedMethod", method) for method in ("GET", "PUT")),
        *(node("AllowedHeader", header) for header in _SIGNED_HEADERS),
        node("MaxAgeSeconds", CORS_SECONDS),
    )


# ---


def _known(found: bytes) -> Node:
    """The document; a server that does not know the question may take it for one about what is in the bucket."""
    root = parse(found)
    if root.name.startswith("List"):
        raise ValueError(f"{root.name} is an answer to another question")
    return root


def _statements(found: bytes) -> list[dict[str, Any]]:
    policy = json.loads(found)
    if not isinstance(policy, dict):
        raise ValueError("the policy is no object")
    statements = policy.get("Statement", [])
    return statements if isinstance(statements, list) else [statements]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _everything(wanted: Wanted) -> str:
    return f"arn:{arn_partition(wanted.region)}:s3:::{wanted.bucket.name}"


def _days(count: int) -> str:
    return f"{count} day{'' if count == 1 else 's'}"


def _life_cycle_fine(wanted: Wanted) -> str:
    raw = f"uploaded files after {_days(wanted.raw_days)}" if wanted.raw_days else "uploaded files are kept"
    parts, versions = _days(ABORT_PARTS_DAYS), _days(wanted.version_days)
    return f"parts of broken uploads end after {parts}, replaced and deleted objects after {versions}; {raw}"


def _encryption_fine(wanted: Wanted) -> str:
    algorithm = wanted.encryption.algorithm
    return f"with {algorithm} by default" if algorithm else "none is asked for (STORAGE_ENCRYPTION=none)"


PARTS = (
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
    Part(
        "encryption",
        "encryption",
        frozenset({"ServerSideEncryptionConfigurationNotFoundError"}),
        ("s3:GetEncryptionConfiguration", "s3:PutEncryptionConfiguration"),
        _encryption_lacks,
        _encryption_made,
        _encryption_fine,
    ),
    Part(
        "versioning",
        "versioning",
        frozenset(),
        ("s3:GetBucketVersioning", "s3:PutBucketVersioning"),
        _versioning_lacks,
        _versioning_made,
        lambda wanted: "on",
    ),
    Part(
        "life cycle",
        "lifecycle",
        frozenset({"NoSuchLifecycleConfiguration"}),
        ("s3:GetLifecycleConfiguration", "s3:PutLifecycleConfiguration"),
        _life_cycle_lacks,
        _life_cycle_made,
        _life_cycle_fine,
    ),
    Part(
        "CORS",
        "cors",
        frozenset({"NoSuchCORSConfiguration"}),
        ("s3:GetBucketCORS", "s3:PutBucketCORS"),
        _cors_lacks,
        _cors_made,
        lambda wanted: (
            f"pages of {', '.join(wanted.origins)} may send files" if wanted.origins else "no web page sends"
        ),
    ),
)
"""In the order in which they are looked at and made."""
