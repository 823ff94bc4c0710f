"""What `storage check` says of stores whose configuration it cannot read: no more than it has seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.simulators.azure_blob import AzureBlob
from tests.simulators.gcs import GoogleStorage
from tests.simulators.object_server import ObjectServer
from tests.simulators.supabase_storage import SupabaseStorage
from upload_pipeline.settings import Settings
from upload_pipeline.storage import anonymous
from upload_pipeline.storage.anonymous import public_url
from upload_pipeline.storage.store_findings import StorePart
from upload_pipeline.storage.store_setup import look_at_store
from upload_pipeline.storage_address import AzureContainer, GoogleBucket


@dataclass
class Place:
    """A simulated store, and the settings that name it."""

    server: ObjectServer
    settings: Settings
    not_offered: set[str]
    where: str


@pytest.fixture(params=["google", "azure", "supabase"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    server = request.getfixturevalue(request.param)
    if isinstance(server, SupabaseStorage):
        url = server.url.replace("http://", "supabase+http://") + "/files/claims"
        lacking, where = {"encryption", "versioning", "life cycle"}, "dashboard"
    elif isinstance(server, GoogleStorage):
        url, lacking, where = "gs://files/claims", set(), "gcloud storage buckets describe gs://files"
    else:
        assert isinstance(server, AzureBlob)
        url, lacking, where = "az://files/claims", set(), "az storage container show --name files"
    return Place(server, Settings(home=tmp_path, storage_url=url), lacking, where)


async def look(place: Place) -> dict[str, StorePart]:
    return {part.part: part for part in await look_at_store(place.settings, mend=False)}


async def test_what_was_not_looked_at_is_not_well_and_not_lacking_and_says_where_to_look(place: Place) -> None:
    parts = await look(place)
    assert (parts.pop("use").state, parts.pop("public access").state) == ("ok", "ok")
    assert {name for name, part in parts.items() if part.state == "not offered"} == place.not_offered
    others = [part for name, part in parts.items() if name not in place.not_offered]
    assert len(others) >= 4
    assert {part.state for part in others} == {"not looked at"}
    assert all(place.where in part.message for part in others)
    assert place.server.keys("files") == set()


async def test_a_bucket_that_anybody_may_read_is_found_out(place: Place) -> None:
    place.server.buckets["files"].public = True
    found = (await look(place))["public access"]
    assert (found.state, "Make the bucket private" in found.message) == ("missing", True)
    assert place.server.keys("files") == set()


async def test_a_store_that_cannot_be_used_is_not_taken_for_a_private_one(place: Place) -> None:
    del place.server.buckets["files"]
    parts = await look(place)
    assert (parts["use"].state, parts["public access"].state) == ("missing", "not looked at")


async def test_no_answer_says_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anonymous, "public_url", lambda *_: "http://127.0.0.1:9/nobody")
    assert (await look(place))["public access"].state == "not looked at"
    assert place.server.keys("files") == set()


def test_the_stores_own_servers_are_asked_where_no_other_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert public_url(GoogleBucket("files", "p/q"), "raw/x") == "https://storage.googleapis.com/files/p/q/raw/x"
    assert public_url(AzureContainer("files", ""), "raw/x") == "https://account.blob.core.windows.net/files/raw/x"
