"""What is said of a part of a bucket's configuration: how it is to be, what it lacks, how it is made so.

Documents are those of S3's API reference (PutBucketEncryption, PutBucketLifecycleConfiguration, ...). S3 replaces a
list of rules as a whole, so rules that are not ours, which their ids tell, are sent back as they came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from upload_pipeline.storage.encryption import Encryption
from upload_pipeline.storage.s3_xml import Node, parse
from upload_pipeline.storage_address import Bucket

OWN = "upload-pipeline"
"""What the ids of our rules begin with; the prefix of the storage URL follows, for several may share a bucket."""

_LONGEST_IN_ID = 200

Document = tuple[bytes, Mapping[str, str]]
"""What is written: the body, and headers. Neither: what is set is deleted."""


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
        """What the ids of rules for this prefix begin with; with what follows, at most the 255 characters of S3."""
        prefix = self.bucket.prefix
        if len(prefix) > _LONGEST_IN_ID:
            prefix = sha256(prefix.encode()).hexdigest()
        return f"{OWN} {prefix}".strip()

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
        made: what to write. None where nobody can mend it from here.
        fine: what it is like when nothing is missing.
    """

    name: str
    subresource: str
    absent: frozenset[str]
    rights: tuple[str, str]
    lacks: Callable[[bytes | None, Wanted], str]
    made: Callable[[bytes | None, Wanted], Document] | None
    fine: Callable[[Wanted], str]


def known(found: bytes | None, *names: str) -> Node:
    """The document, an empty one where nothing is set.

    Args:
        found: as the server has it.
        names: that its root may have. Of another document, nothing that it lacks would mean anything.

    Raises:
        ValueError: it is no XML, or another document.
    """
    if found is None:
        return Node("")
    root = parse(found)
    if root.name not in names:
        raise ValueError(f"{root.name} is no {names[0]}")
    return root
