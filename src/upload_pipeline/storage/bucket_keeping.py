"""What a bucket does with what is in it: how it is encrypted, for how long it is kept, which web pages send to it."""

from __future__ import annotations

from upload_pipeline.storage.bucket_part import Document, Part, Wanted, known
from upload_pipeline.storage.encryption import ALGORITHM_HEADER, KEY_HEADER
from upload_pipeline.storage.s3_xml import Node, node, render

ABORT_PARTS_DAYS = 1
"""After which parts of an upload that never ended are removed; S3 counts in days, and no upload of ours takes one."""

CORS_SECONDS = 3600
"""For which a browser remembers the bucket's consent."""

_SIGNED_HEADERS = ("content-type", "if-none-match", "x-amz-checksum-sha256", ALGORITHM_HEADER, KEY_HEADER)
"""Of a signed PUT, that a browser asks for; it sends the length by itself."""


def _encryption_lacks(found: bytes | None, wanted: Wanted) -> str:
    algorithm = wanted.encryption.algorithm
    if algorithm is None:
        return ""
    path = ("Rule", "ApplyServerSideEncryptionByDefault")
    default = known(found, "ServerSideEncryptionConfiguration")
    given, key = default.value(*path, "SSEAlgorithm"), default.value(*path, "KMSMasterKeyID")
    # Keys of the key service are more than AES-256 with keys of S3's own, never less.
    if given != algorithm and not given.startswith("aws:kms"):
        return f"objects are kept with {given or 'no encryption'} by default, not with {algorithm}"
    named = wanted.encryption.kms_key_id
    if named and key != named and not key.endswith(f"/{named}"):
        return f"the default key is {key or 'that of the account'}, not {named}"
    return ""


def _encryption_made(found: bytes | None, wanted: Wanted) -> Document:
    default = [node("SSEAlgorithm", wanted.encryption.algorithm or "")]
    more = []
    if wanted.encryption.kms_key_id:
        default.append(node("KMSMasterKeyID", wanted.encryption.kms_key_id))
    if wanted.encryption.kind == "kms":
        more.append(node("BucketKeyEnabled", "true"))
    rule = node("Rule", node("ApplyServerSideEncryptionByDefault", *default), *more)
    return render(node("ServerSideEncryptionConfiguration", rule)), {}


def _versioning_lacks(found: bytes | None, wanted: Wanted) -> str:
    # Where it was never set, some servers answer under the name that this had in S3's API of SOAP.
    status = known(found, "VersioningConfiguration", "GetBucketVersioningResponse").value("Status")
    return "" if status == "Enabled" else "what is replaced or deleted by mistake is gone at once"


def _versioning_made(found: bytes | None, wanted: Wanted) -> Document:
    return render(node("VersioningConfiguration", node("Status", "Enabled"))), {}


def _life_cycle_lacks(found: bytes | None, wanted: Wanted) -> str:
    given = known(found, "LifecycleConfiguration").all("Rule")
    facts = {rule.value("ID"): rule.facts() for rule in given}
    rules = {rule.value("ID"): rule for rule in _rules(wanted)}
    missing = [name for name, rule in rules.items() if facts.get(name) != rule.facts()]
    past = [name for name in facts if _is_own(name, wanted) and name not in rules]
    told = [f"no such rule as {name!r}" for name in missing] + [f"{name!r} is not wanted any more" for name in past]
    return "; ".join(told)


def _life_cycle_made(found: bytes | None, wanted: Wanted) -> Document:
    given = known(found, "LifecycleConfiguration").children
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


def _cors_lacks(found: bytes | None, wanted: Wanted) -> str:
    given = known(found, "CORSConfiguration").all("CORSRule")
    own = [rule.facts() for rule in given if rule.value("ID") == wanted.own]
    if not wanted.origins:
        return "web pages are let in that CORS_ORIGINS does not name" if own else ""
    if own != [_cors_rule(wanted).facts()]:
        return f"pages of {', '.join(wanted.origins)} cannot send files to it"
    return ""


def _cors_made(found: bytes | None, wanted: Wanted) -> Document:
    given = known(found, "CORSConfiguration").children
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


def _days(count: int) -> str:
    return f"{count} day{'' if count == 1 else 's'}"


def _life_cycle_fine(wanted: Wanted) -> str:
    raw = f"uploaded files after {_days(wanted.raw_days)}" if wanted.raw_days else "uploaded files are kept"
    parts, versions = _days(ABORT_PARTS_DAYS), _days(wanted.version_days)
    return f"parts of broken uploads end after {parts}, replaced and deleted objects after {versions}; {raw}"


def _encryption_fine(wanted: Wanted) -> str:
    algorithm = wanted.encryption.algorithm
    return f"with {algorithm} by default" if algorithm else "none is asked for (STORAGE_ENCRYPTION=none)"


KEEPING = (
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
"""The parts, in the order in which they are looked at and made."""
