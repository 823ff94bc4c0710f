"""Encryption at rest that is asked of S3 with each object that is written.

Names and values are those of S3's API (PutObject, CreateMultipartUpload, CopyObject). Parts of an upload carry none:
the request that began it speaks for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from upload_pipeline.errors import ErrorCode, PipelineError

SETTING = "UPLOAD_PIPELINE_STORAGE_ENCRYPTION"
KEY_SETTING = "UPLOAD_PIPELINE_STORAGE_KMS_KEY_ID"

ALGORITHM_HEADER = "x-amz-server-side-encryption"
KEY_HEADER = "x-amz-server-side-encryption-aws-kms-key-id"

_ALGORITHMS = {"aes256": "AES256", "kms": "aws:kms"}


@dataclass(frozen=True, slots=True)
class Encryption:
    """What a write asks for.

    Attributes:
        kind: `aes256` with keys of S3's own, `kms` with keys of the key service, or `none` at all.
        kms_key_id: of the key, by id, ARN or alias; empty: the account's own key for S3.
    """

    kind: Literal["aes256", "kms", "none"] = "aes256"
    kms_key_id: str = ""

    @property
    def algorithm(self) -> str | None:
        """As S3 names it; `None` where nothing is asked for."""
        return _ALGORITHMS.get(self.kind)

    def headers(self) -> dict[str, str]:
        """What a request that writes an object must carry, by lower-case name."""
        headers: dict[str, str] = {}
        if self.algorithm is not None:
            headers[ALGORITHM_HEADER] = self.algorithm
            if self.kms_key_id:
                headers[KEY_HEADER] = self.kms_key_id
        return headers


AES256 = Encryption()
"""What is asked for where nothing is set: every bucket on S3 offers it, and it costs nothing."""


def refuse_contradiction(encryption: Encryption, environment: Mapping[str, str] = os.environ) -> None:
    """Sees that the variables that S3's own tools read say nothing else than the settings.

    Raises:
        PipelineError: `SETTING_INVALID`, naming the variable and the setting that takes its place.
    """
    for variable, meant, setting in (
        ("AWS_SERVER_SIDE_ENCRYPTION", encryption.algorithm or "", SETTING),
        ("AWS_SSE_KMS_KEY_ID", encryption.kms_key_id, KEY_SETTING),
    ):
        given = environment.get(variable, "")
        if given and given != meant:
            raise PipelineError(
                ErrorCode.SETTING_INVALID,
                f"{variable}={given!r} contradicts {setting}, which says {meant or 'nothing'!r}. Remove the variable "
                f"and let {SETTING} (aes256, kms or none) and {KEY_SETTING} say what is asked of the bucket.",
                {"setting": variable, "value": given},
            )
