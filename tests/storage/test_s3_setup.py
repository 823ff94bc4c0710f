"""A bucket's configuration on servers that know less than S3, fail, or keep less than they take."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from aiohttp import web
from s3_proxy import Passed, Proxy, s3_proxy
from s3_servers import S3Server

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.storage import s3_admin
from upload_pipeline.storage.bucket_access import TLS_SID
from upload_pipeline.storage.bucket_part import Wanted
from upload_pipeline.storage.encryption import Encryption
from upload_pipeline.storage.s3_admin import open_admin
from upload_pipeline.storage.s3_policies import Place, process_policy
from upload_pipeline.storage.s3_setup import PARTS, look_at_bucket
from upload_pipeline.storage.s3_xml import Node, node, parse, render
from upload_pipeline.storage.store import open_store
from upload_pipeline.storage.store_findings import StorePart
from upload_pipeline.storage_address import Bucket

REGION = "eu-central-1"


@pytest.fixture
async def proxy(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Proxy]:
    async with s3_proxy(s3_server.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture
def wanted(s3_bucket: str) -> Wanted:
    return Wanted(Bucket(s3_bucket, ""), REGION, False, Encryption(), (), 0, 7)


async def look(wanted: Wanted, *, mend: bool) -> dict[str, StorePart]:
    async with open_admin(wanted.bucket) as admin:
        return {part.part: part for part in await look_at_bucket(admin, wanted, mend=mend)}


def answering(subresource: str, method: str, *answers: tuple[int, str]) -> Any:
    """Spoils the first requests of a configuration; the last answer goes on for ever where it is the only one."""
    told = list(answers)

    async def spoil(request: web.Request, seen: Passed, before: int) -> web.Response | None:
        if subresource not in seen.query or seen.method != method or not told:
            return None
        await request.read()
        status, text = told[0] if len(answers) == 1 else told.pop(0)
        return web.Response(status=status, text=text)

    return spoil


@pytest.mark.parametrize(
    "answer",
    [
        (501, "<Error><Code>NotImplemented</Code><Message>A header implies something else</Message></Error>"),
        (405, "<Error><Code>MethodNotAllowed</Code><Message>No</Message></Error>"),
        (400, "<Error><Code>NotImplemented</Code></Error>"),
        (200, "<ListBucketResult><Name>taken for a listing</Name></ListBucketResult>"),
    ],
)
async def test_what_a_server_does_not_know_is_not_offered_and_no_failure(
    proxy: Proxy, wanted: Wanted, answer: tuple[int, str]
) -> None:
    proxy.spoil = answering("publicAccessBlock", "GET", answer)
    parts = await look(wanted, mend=True)
    assert parts["public access"].state == "not offered"
    assert all(part.well for part in parts.values())
    assert not [seen for seen in proxy.passed if seen.method == "PUT" and "publicAccessBlock" in seen.query]


@pytest.mark.parametrize("answer", ["welcome", "", "<html><body>welcome</body></html>", '{"Statement": ["all"]}'])
@pytest.mark.parametrize(
    ("subresource", "part"),
    [
        *(
            ("acl", "access list"),
            ("policyStatus", "policy"),
            ("publicAccessBlock", "public access"),
            ("policy", "TLS"),
        ),
        *(("encryption", "encryption"), ("versioning", "versioning"), ("lifecycle", "life cycle"), ("cors", "CORS")),
    ],
)
async def test_an_answer_that_nobody_can_read_is_not_well(
    proxy: Proxy, wanted: Wanted, subresource: str, part: str, answer: str
) -> None:
    proxy.spoil = answering(subresource, "GET", (200, answer))
    over_tls = replace(wanted, tls=True)
    for mend in (False, True):
        found = (await look(over_tls, mend=mend))[part]
        assert (found.state, "cannot be read" in found.message) == ("missing", True)
    assert not [seen for seen in proxy.passed if seen.method == "PUT" and subresource in seen.query]


@pytest.mark.parametrize("answer", ["welcome", "", "<html><body>welcome</body></html>"])
async def test_a_server_that_is_none_of_buckets_is_told(proxy: Proxy, wanted: Wanted, answer: str) -> None:
    proxy.spoil = answering("location", "GET", (200, answer))
    parts = await look(wanted, mend=True)
    assert [(part.part, part.state) for part in parts.values()] == [("bucket", "missing")]
    assert "AWS_ENDPOINT_URL" in parts["bucket"].message


async def test_a_server_that_takes_the_question_for_a_listing_has_the_bucket(proxy: Proxy, wanted: Wanted) -> None:
    proxy.spoil = answering("location", "GET", (200, "<ListBucketResult/>"))
    assert (await look(wanted, mend=False))["bucket"].state == "ok"
    proxy.spoil = answering("policy", "GET", (200, "<ListBucketResult/>"))
    assert (await look(replace(wanted, tls=True), mend=False))["TLS"].state == "not offered"


async def test_a_change_that_the_server_does_not_keep_is_no_success(proxy: Proxy, wanted: Wanted) -> None:
    proxy.spoil = answering("versioning", "PUT", (200, ""))
    parts = await look(wanted, mend=True)
    assert parts["versioning"].state == "missing"
    assert "did not keep it" in parts["versioning"].message
    assert parts["life cycle"].state == "changed"


async def test_a_refusal_is_told_in_the_words_of_the_server(proxy: Proxy, wanted: Wanted) -> None:
    refusal = "<Error><Code>InvalidRequest</Code><Message>only one action is taken.</Message></Error>"
    proxy.spoil = answering("lifecycle", "PUT", (400, refusal))
    found = (await look(wanted, mend=True))["life cycle"]
    assert (found.state, "InvalidRequest: only one action is taken." in found.message) == ("missing", True)


async def test_a_server_that_fails_is_asked_again(
    proxy: Proxy, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(s3_admin.asyncio, "sleep", wait)
    busy = (503, "<Error><Code>SlowDown</Code></Error>")
    proxy.spoil = answering("versioning", "PUT", busy, busy, busy)
    assert (await look(wanted, mend=True))["versioning"].state == "changed"
    assert waits == [1, 2, 4]
    proxy.spoil = answering("encryption", "GET", busy)
    with pytest.raises(PipelineError) as caught:
        await look(wanted, mend=False)
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert waits == [1, 2, 4] * 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(PipelineError) as caught:
        await look(wanted, mend=False)
    assert caught.value.code is ErrorCode.STORAGE_UNAVAILABLE
    assert "127.0.0.1:9" in caught.value.message


async def test_two_setups_at_once_do_not_disturb_each_other(
    proxy: Proxy, wanted: Wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(seconds: float) -> None: ...

    monkeypatch.setattr(s3_admin.asyncio, "sleep", at_once)
    busy = (
        409,
        "<Error><Code>OperationAborted</Code><Message>A conflicting operation is in progress</Message></Error>",
    )
    proxy.spoil = answering("versioning", "PUT", busy, busy)
    assert (await look(wanted, mend=True))["versioning"].state == "changed"

    async def made_meanwhile(request: web.Request, seen: Passed, before: int) -> web.Response | None:
        if seen.query or seen.method != "PUT":
            return None
        await request.read()
        return web.Response(status=409, text="<Error><Code>BucketAlreadyOwnedByYou</Code></Error>")

    proxy.spoil = made_meanwhile
    parts = await look(replace(wanted, bucket=Bucket(f"made-{uuid4()}", "")), mend=True)
    assert parts["bucket"].state == "ok"


async def test_the_longest_prefix_has_rules_too(wanted: Wanted) -> None:
    deep = replace(wanted, bucket=replace(wanted.bucket, prefix="p" * 512), origins=("https://a.example.com",))
    assert (await look(deep, mend=True))["life cycle"].state == "changed"
    assert {part.state for part in (await look(deep, mend=True)).values()} == {"ok"}
    assert len(deep.own) < 255 - len(": versions")
    assert deep.own != replace(deep, bucket=replace(deep.bucket, prefix="q" * 512)).own


async def test_a_bucket_of_somebody_elses_name_is_told(proxy: Proxy, wanted: Wanted) -> None:
    taken = "<Error><Code>BucketAlreadyExists</Code><Message>Take another name</Message></Error>"

    async def spoil(request: web.Request, seen: Passed, before: int) -> web.Response | None:
        return web.Response(status=409, text=taken) if seen.method == "PUT" else None

    proxy.spoil = spoil
    parts = await look(replace(wanted, bucket=Bucket(f"taken-{uuid4()}", "")), mend=True)
    assert [(part.part, part.state) for part in parts.values()] == [("bucket", "missing")]
    assert "BucketAlreadyExists" in parts["bucket"].message


@pytest.mark.parametrize("file_sha256", [None, "0" * 64])
async def test_web_pages_may_send_every_header_that_a_signed_put_asks_for(
    wanted: Wanted, file_sha256: str | None
) -> None:
    store = open_store(f"s3://{wanted.bucket.name}", encryption=Encryption("kms", "alias/claims"))
    signed = await store.sign_put(
        "raw/x", media_type="image/png", file_bytes=1, file_sha256=file_sha256, expires_in=timedelta(minutes=1)
    )
    assert signed is not None
    cors = next(part for part in PARTS if part.name == "CORS")
    assert cors.made is not None
    body, _ = cors.made(None, replace(wanted, origins=("https://app.example.com",)))
    (rule,) = parse(body).all("CORSRule")
    # the length is the browser's own to send
    assert signed.headers.keys() - {"content-length"} <= {header.text for header in rule.all("AllowedHeader")}


# --- TLS: moto is reached without, but keeps what is asked of a server that is


async def test_requests_without_tls_are_denied_beside_what_others_say(
    s3_server: S3Server, s3_bucket: str, wanted: Wanted
) -> None:
    theirs = {"Sid": "Theirs", "Effect": "Deny", "Principal": "*", "Action": "s3:PutObjectAcl", "Resource": "*"}
    s3_server.configure(s3_bucket, "policy", json.dumps({"Version": "2012-10-17", "Statement": theirs}).encode())
    over_tls = replace(wanted, tls=True)
    assert (await look(over_tls, mend=False))["TLS"].state == "missing"
    assert (await look(over_tls, mend=True))["TLS"].state == "changed"
    parts = await look(over_tls, mend=True)
    assert (parts["TLS"].state, parts["policy"].state) == ("ok", "ok")
    kept, own = json.loads(s3_server.listing(s3_bucket, "policy"))["Statement"]
    assert (kept, own["Sid"], own["Effect"]) == (theirs, TLS_SID, "Deny")
    assert own["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    plain = own["Condition"]
    for change in (
        {"Effect": "Allow"},
        {"Resource": own["Resource"][:1]},
        {"Action": "s3:Get*"},
        {"Condition": {}},
        {"Condition": "Bool"},
        {"Condition": {"Bool": "aws:SecureTransport"}},
        {"Condition": {"Bool": {"aws:SecureTransport": "true"}}},
        {"Condition": {"Bool": {"aws:SecureTransport": ["false", "true"]}}},
        {"Condition": {"Bool": {**plain["Bool"], "aws:ViaAWSService": "false"}}},
        {"Condition": {**plain, "IpAddress": {"aws:SourceIp": "192.0.2.0/24"}}},
    ):
        weaker = {"Version": "2012-10-17", "Statement": [own | change]}
        s3_server.configure(s3_bucket, "policy", json.dumps(weaker).encode())
        assert (await look(over_tls, mend=False))["TLS"].state == "missing", change
    for change in ({}, {"Condition": {"Bool": {"aws:securetransport": [False]}}}):
        as_well = {"Version": "2012-10-17", "Statement": [own | change]}
        s3_server.configure(s3_bucket, "policy", json.dumps(as_well).encode())
        assert (await look(over_tls, mend=False))["TLS"].state == "ok", change


# --- XML


def test_xml_is_read_without_namespaces_and_written_escaped() -> None:
    root = node("A", node("B", "<&> é"), node("C", node("D", 1)))
    assert b"&lt;&amp;&gt;" in render(root)
    assert parse(render(root)) == root
    assert root.value("C", "D") == "1"
    assert root.value("C", "E", "F") == ""
    assert node("A", Node("B"), node("C", "x")).facts() == node("A", node("C", "x")).facts()


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<a>",
        b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>',
        b'<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;">]><a>&y;</a>',
    ],
)
def test_xml_that_is_none_or_brings_entities_is_refused(document: bytes) -> None:
    with pytest.raises(ValueError, match=r"no XML|document type"):
        parse(document)


# --- policies


@pytest.mark.parametrize(
    ("key", "resource", "alias"),
    [
        ("", None, None),
        ("0b6ad4a2", "arn:aws:kms:eu-central-1:*:key/0b6ad4a2", None),
        ("alias/claims", "arn:aws:kms:eu-central-1:*:key/*", "alias/claims"),
        ("arn:aws:kms:eu-west-1:1:key/x", "arn:aws:kms:eu-west-1:1:key/x", None),
        ("arn:aws:kms:eu-west-1:1:alias/claims", "arn:aws:kms:eu-west-1:1:key/*", "alias/claims"),
    ],
)
def test_a_key_is_named_as_policies_can(key: str, resource: str | None, alias: str | None) -> None:
    place = Place(Bucket("bucket", ""), REGION, Encryption("kms", key))
    statements = [one for one in process_policy("api", place)["Statement"] if one["Sid"] == "Key"]
    assert [one["Resource"] for one in statements] == ([resource] if resource else [])
    found = [
        one.get("Condition", {}).get("ForAnyValue:StringEquals", {}).get("kms:ResourceAliases") for one in statements
    ]
    assert found == ([alias] if resource else [])


@pytest.mark.parametrize(
    ("region", "arn"), [("cn-north-1", "arn:aws-cn:s3:::b-1"), ("us-gov-west-1", "arn:aws-us-gov:s3:::b-1")]
)
def test_the_separate_worlds_of_aws_have_names_of_their_own(region: str, arn: str) -> None:
    policy = process_policy("workers", Place(Bucket("b-1", "p"), region, Encryption()))
    assert policy["Statement"][0]["Resource"] == arn
    assert policy["Statement"][1]["Resource"] == f"{arn}/p/incoming/*"
