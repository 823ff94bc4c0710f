"""Signed URLs of Azure Blob Storage that bind how a browser shows what it gets.

A shared access signature can bind neither type nor length nor content of what is sent, so none is made for uploads:
the service takes their bytes. For downloads obstore's URL is signed again with name and type in it; that needs the
account's key, so an identity (of a machine, a client secret, a token) signs none.
Source: Azure Storage REST API, "Create a service SAS", versions 2020-12-06 and later.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import obstore
from obstore.store import AzureStore

from upload_pipeline.storage.disposition import attachment
from upload_pipeline.storage.objects import SignedUrl

# In the order in which they are signed; a blank stands for one that is never set here.
_BEFORE_RESOURCE = ("sp", "st", "se")
_AFTER_RESOURCE = ("", "", "spr", "sv", "sr", "", "", "", "rscd", "", "", "rsct")


@dataclass(frozen=True, slots=True)
class AzureUrls:
    """Signs URLs for the objects of a container.

    Attributes:
        place: the container, with its prefix.
        account: its name.
        container: its name, and the prefix behind it.
        account_key: in base64, as Azure gives it; never part of a URL or a message.
    """

    place: AzureStore
    account: str
    container: str
    account_key: str = field(repr=False)

    async def put(
        self,
        key: str,
        *,
        media_type: str,
        file_bytes: int,
        file_sha256: str | None,
        expires_in: timedelta,
        caller_token: str | None,
    ) -> SignedUrl | None:
        """None: anything could be sent by it."""
        return None

    async def get(
        self, key: str, *, filename: str, media_type: str | None, expires_in: timedelta, caller_token: str | None
    ) -> SignedUrl | None:
        """A GET that a browser saves under the name; `None` where obstore signs with other credentials."""
        url = await obstore.sign_async(self.place, "GET", key, expires_in)
        parts = urlsplit(url)
        parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
        # With an endpoint of another host than Azure's, obstore takes the path for one that begins with the account.
        meant = (f"/blob/{self.account}{parts.path}", f"/blob{parts.path}")
        signature = parameters.pop("sig")
        if all(self._signature(resource, parameters) != signature for resource in meant):
            return None
        parameters["rscd"] = attachment(filename)
        if media_type is not None:
            parameters["rsct"] = media_type
        parameters["sig"] = self._signature(f"/blob/{self.account}/{self.container}/{key}", parameters)
        return SignedUrl(urlunsplit(parts._replace(query=urlencode(parameters))), {})

    async def check(self) -> str:
        """Nothing has to be asked."""
        return "clients send bytes to URLs of the service, and fetch them by URLs of the container"

    async def close(self) -> None:
        """Nothing is open between calls."""

    def _signature(self, resource: str, parameters: Mapping[str, str]) -> str:
        fields = [
            *(parameters.get(name, "") for name in _BEFORE_RESOURCE),
            resource,
            *(parameters.get(name, "") for name in _AFTER_RESOURCE),
        ]
        secret = base64.b64decode(self.account_key)
        return base64.b64encode(hmac.digest(secret, "\n".join(fields).encode(), "sha256")).decode()
