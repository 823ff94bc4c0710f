"""`storage setup|check|policies` on buckets, on directories, and on servers that know less than S3."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from command_runs import Ended, Terminal
from s3_servers import POWERLESS_KEY_ID, S3Server

from tests.simulators.simulator_process import running_simulator

ORIGINS = '["https://app.example.com"]'
BARE = {"public access", "encryption", "versioning", "life cycle", "CORS"}
"""What a bucket lacks that was only made; its access list is private from the beginning."""


@pytest.fixture
def settings(s3_server: S3Server, bare_terminal: Terminal) -> dict[str, str]:
    """Of commands for a bucket that does not exist yet; no database is ever asked for."""
    bare_terminal.environment.update(s3_server.environment())
    return {"storage_url": f"s3://new-{uuid4()}/claims", "cors_origins": ORIGINS, "storage_raw_days": "30"}


def bucket_of(settings: dict[str, str]) -> str:
    return settings["storage_url"].split("/")[2]


def states(ended: Ended) -> dict[str, str]:
    return {part["part"]: part["state"] for part in ended.object()["parts"]}


def message(ended: Ended, part: str) -> str:
    (found,) = [one["message"] for one in ended.object()["parts"] if one["part"] == part]
    return str(found)


def configuration(server: S3Server, bucket: str) -> dict[str, str]:
    names = ("acl", "publicAccessBlock", "encryption", "versioning", "lifecycle", "cors", "policy")
    found = {}
    for name in names:
        try:
            found[name] = re.sub(r"<RequestId>.*?</HostId>", "", server.listing(bucket, name))
        except AssertionError as error:
            found[name] = re.findall(r"<Code>(\w+)", str(error))[0]
    return found


def test_setup_makes_the_bucket_and_a_second_one_changes_nothing(
    bare_terminal: Terminal, settings: dict[str, str], s3_server: S3Server
) -> None:
    first = bare_terminal("storage", "setup", "--json", **settings)
    assert first.status == 0, first.out + first.err
    assert {part for part, state in states(first).items() if state == "changed"} == {"bucket", *BARE}
    made = configuration(s3_server, bucket_of(settings))
    assert made["publicAccessBlock"].lower().count(">true<") == 4
    assert "<SSEAlgorithm>AES256</SSEAlgorithm>" in made["encryption"]
    assert "<Status>Enabled</Status>" in made["versioning"]
    assert "<DaysAfterInitiation>1</DaysAfterInitiation>" in made["lifecycle"]
    assert "<NoncurrentDays>7</NoncurrentDays>" in made["lifecycle"]
    assert "<Days>30</Days>" in made["lifecycle"]
    assert "<Prefix>claims/raw/</Prefix>" in made["lifecycle"]
    assert "<AllowedOrigin>https://app.example.com</AllowedOrigin>" in made["cors"]
    assert "<AllowedHeader>x-amz-server-side-encryption</AllowedHeader>" in made["cors"]

    second = bare_terminal("storage", "setup", "--json", **settings)
    assert (second.status, second.object()["changed"], second.object()["ok"]) == (0, 0, True)
    assert configuration(s3_server, bucket_of(settings)) == made
    shown = bare_terminal("storage", "setup", **settings)
    assert (shown.status, "Nothing to change." in shown.out) == (0, True)
    checked = bare_terminal("storage", "check", **settings)
    assert (checked.status, "All is well." in checked.out) == (0, True)


def test_check_names_what_is_missing_and_changes_nothing(
    bare_terminal: Terminal, settings: dict[str, str], s3_server: S3Server
) -> None:
    absent = bare_terminal("storage", "check", "--json", **settings)
    assert (absent.status, states(absent)) == (1, {"bucket": "missing"})
    assert "storage setup" in message(absent, "bucket")
    s3_server.make_bucket(bucket_of(settings))
    before = configuration(s3_server, bucket_of(settings))
    bare = bare_terminal("storage", "check", "--json", **settings)
    assert bare.status == 1
    assert {part for part, state in states(bare).items() if state == "missing"} == BARE
    assert "upload-pipeline claims: parts" in message(bare, "life cycle")
    assert "https://app.example.com" in message(bare, "CORS")
    assert configuration(s3_server, bucket_of(settings)) == before
    shown = bare_terminal("storage", "check", **settings)
    assert (shown.status, "5 parts not as it should be." in shown.out) == (1, True)
    assert re.search(r"^missing +versioning ", shown.out, re.MULTILINE)


def test_rules_and_statements_of_others_stay(
    bare_terminal: Terminal, settings: dict[str, str], s3_server: S3Server
) -> None:
    bucket = bucket_of(settings)
    s3_server.make_bucket(bucket)
    theirs = (
        b"<LifecycleConfiguration><Rule><ID>theirs</ID><Filter><Prefix>logs/</Prefix></Filter>"
        b"<Status>Enabled</Status><Expiration><Days>3</Days></Expiration></Rule></LifecycleConfiguration>"
    )
    s3_server.configure(bucket, "lifecycle", theirs)
    s3_server.configure(
        bucket,
        "cors",
        b"<CORSConfiguration><CORSRule><ID>theirs</ID><AllowedOrigin>https://other.example.com</AllowedOrigin>"
        b"<AllowedMethod>GET</AllowedMethod></CORSRule></CORSConfiguration>",
    )
    beside = {**settings, "storage_url": f"s3://{bucket}/second"}
    for each in (settings, beside, settings):
        assert bare_terminal("storage", "setup", **each).status == 0
    made = configuration(s3_server, bucket)
    for name, ours in (("lifecycle", "upload-pipeline claims: raw"), ("cors", "upload-pipeline claims")):
        ids = re.findall(r"<ID>([^<]+)</ID>", made[name])
        assert "theirs" in ids
        assert ids.count(ours) == ids.count(ours.replace("claims", "second")) == 1

    without = {"storage_url": settings["storage_url"]}
    drifted = bare_terminal("storage", "check", "--json", **without)
    assert {part for part, state in states(drifted).items() if state == "missing"} == {"life cycle", "CORS"}
    assert "'upload-pipeline claims: raw' is not wanted any more" in message(drifted, "life cycle")
    assert bare_terminal("storage", "setup", **without).status == 0
    left = configuration(s3_server, bucket)
    assert "upload-pipeline claims: raw" not in left["lifecycle"]
    assert "upload-pipeline second: raw" in left["lifecycle"]
    assert set(re.findall(r"<ID>([^<]+)</ID>", left["cors"])) == {"theirs", "upload-pipeline second"}


def test_the_last_rule_for_web_pages_goes_with_its_origin(
    bare_terminal: Terminal, settings: dict[str, str], s3_server: S3Server
) -> None:
    assert bare_terminal("storage", "setup", **settings).status == 0
    assert bare_terminal("storage", "setup", **{**settings, "cors_origins": "[]"}).status == 0
    assert configuration(s3_server, bucket_of(settings))["cors"] == "NoSuchCORSConfiguration"


def test_a_bucket_that_is_open_to_all_is_closed_or_named(
    bare_terminal: Terminal, settings: dict[str, str], s3_server: S3Server
) -> None:
    bucket = bucket_of(settings)
    s3_server.make_bucket(bucket)
    everybody = {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
        ],
    }
    s3_server.configure(bucket, "acl", b"", x_amz_acl="public-read")
    s3_server.configure(bucket, "policy", json.dumps(everybody).encode())
    found = states(bare_terminal("storage", "check", "--json", **settings))
    assert (found["access list"], found["policy"]) == ("missing", "missing")
    made = bare_terminal("storage", "setup", "--json", **settings)
    assert (made.status, states(made)["access list"], states(made)["policy"]) == (1, "changed", "missing")
    assert "principal *" in message(made, "policy")
    # Somebody else's statement is theirs to remove.
    assert json.loads(configuration(s3_server, bucket)["policy"]) == everybody
    assert "AllUsers" not in configuration(s3_server, bucket)["acl"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"storage_encryption": "kms"}, ("aws:kms", "")),
        ({"storage_encryption": "kms", "storage_kms_key_id": "alias/claims"}, ("aws:kms", "alias/claims")),
        ({"storage_encryption": "none"}, ("", "")),
    ],
)
def test_the_default_encryption_is_the_one_of_the_settings(
    bare_terminal: Terminal, settings: dict[str, str], s3_server: S3Server, more: Any, expected: tuple[str, str]
) -> None:
    assert bare_terminal("storage", "setup", **settings, **more).status == 0
    made = configuration(s3_server, bucket_of(settings))["encryption"]
    found = [re.findall(f"<{name}>([^<]+)", made) for name in ("SSEAlgorithm", "KMSMasterKeyID")]
    assert tuple("".join(values) for values in found) == expected
    assert bare_terminal("storage", "setup", "--json", **settings, **more).object()["changed"] == 0
    # AES-256 where the bucket has more is no reason to give it less.
    again = bare_terminal("storage", "setup", "--json", **settings).object()
    assert again["changed"] == (expected[0] == "")


def test_keys_that_may_not_look_are_told_which_right_they_lack(
    bare_terminal: Terminal, settings: dict[str, str], s3_server: S3Server
) -> None:
    s3_server.make_bucket(bucket_of(settings))
    bare_terminal.environment["AWS_ACCESS_KEY_ID"] = POWERLESS_KEY_ID
    ended = bare_terminal("storage", "check", "--json", **settings)
    assert (ended.status, states(ended)) == (1, {"bucket": "denied"})
    assert "s3:GetBucketLocation" in message(ended, "bucket")
    policies = json.loads(bare_terminal("storage", "policies", **settings).out)
    policies["setup"]["Statement"][0]["Action"].remove("s3:PutLifecycleConfiguration")
    bare_terminal.environment.update(s3_server.give_policy(f"AKIA{uuid4().hex}", policies["setup"]))
    partly = bare_terminal("storage", "setup", "--json", **settings)
    assert (partly.status, states(partly)["life cycle"], states(partly)["CORS"]) == (1, "denied", "changed")
    assert "s3:PutLifecycleConfiguration" in message(partly, "life cycle")


@pytest.mark.parametrize(
    ("variable", "value", "status", "told"),
    [
        ("AWS_ACCESS_KEY_ID", "", 2, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"),
        ("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN", 1, "InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", 1, "SignatureDoesNotMatch"),
    ],
)
def test_keys_that_are_wrong_are_one_error(
    bare_terminal: Terminal, settings: dict[str, str], variable: str, value: str, status: int, told: str
) -> None:
    bare_terminal.environment[variable] = value
    ended = bare_terminal("storage", "check", **settings)
    assert (ended.status, told in ended.err) == (status, True), (ended.out, ended.err)


def test_temporary_keys_and_other_regions(
    bare_terminal: Terminal, settings: dict[str, str], s3_server: S3Server
) -> None:
    bare_terminal.environment.update(AWS_SESSION_TOKEN="to/k+en=", AWS_REGION="us-east-1")
    assert bare_terminal("storage", "setup", **settings).status == 0
    assert "us-east-1" in message(bare_terminal("storage", "check", "--json", **settings), "bucket")


def test_policies_differ_and_name_the_prefix_and_the_key(bare_terminal: Terminal, settings: dict[str, str]) -> None:
    key = "arn:aws:kms:eu-central-1:123456789012:key/0b6ad4a2"
    kms = {"storage_encryption": "kms", "storage_kms_key_id": key}
    policies = json.loads(bare_terminal("storage", "policies", **settings, **kms).out)
    assert policies.keys() == {"api", "workers", "setup"}
    assert policies["api"] != policies["workers"]
    for process, policy in policies.items():
        assert json.loads(bare_terminal("storage", "policies", "--for", process, **settings, **kms).out) == policy
        assert policy["Statement"][-1]["Resource"] == key
        for statement in policy["Statement"][1:-1]:
            assert statement["Resource"].startswith(f"arn:aws:s3:::{bucket_of(settings)}/claims/")
    checked = bare_terminal("storage", "check", "--json", **settings, **kms).object()
    assert checked["policies"] == policies


# --- other stores


def test_supabase_storage_is_well_as_far_as_anybody_has_looked(bare_terminal: Terminal, s3_server: S3Server) -> None:
    bare_terminal.environment.update(s3_server.environment())
    with running_simulator("tests.simulators.supabase_storage", "--bucket", "files") as url:
        here = {"storage_url": f"supabase+http://{url.removeprefix('http://')}/files/claims"}
        for command in ("setup", "check"):
            ended = bare_terminal("storage", command, "--json", **here)
            assert (ended.status, ended.object()["changed"], ended.object()["policies"]) == (0, 0, None), ended.out
            found = states(ended)
            assert (found.pop("use"), found.pop("public access")) == ("ok", "ok")
            assert found["versioning"] == "not offered"
            unseen = [part for part, state in found.items() if state == "not looked at"]
            assert ended.object()["not_looked_at"] == len(unseen) == 4
            shown = bare_terminal("storage", command, **here)
            assert shown.status == 0
            assert shown.out.splitlines()[-1] == "4 parts not looked at; all else is well."
        elsewhere = {"storage_url": here["storage_url"].replace("/files/", "/nothing/")}
        broken = bare_terminal("storage", "check", "--json", **elsewhere)
        assert (broken.status, states(broken)["use"]) == (1, "missing")


# --- directories


def test_a_directory_has_permissions_and_room_and_says_what_it_has_not(bare_terminal: Terminal, tmp_path: Path) -> None:
    root = tmp_path / "files"
    here = {"storage_url": f"file://{root}", "min_free_bytes": "1"}
    absent = bare_terminal("storage", "check", "--json", **here)
    assert (absent.status, states(absent)) == (1, {"directory": "missing"})
    assert not root.exists()
    made = bare_terminal("storage", "setup", "--json", **here)
    assert (made.status, made.object()["changed"], made.object()["policies"]) == (0, 1, None)
    assert states(made)["versioning"] == states(made)["CORS"] == "not offered"
    assert root.stat().st_mode & 0o777 == 0o700
    assert bare_terminal("storage", "setup", "--json", **here).object()["changed"] == 0

    root.chmod(0o755)
    opened = bare_terminal("storage", "check", "--json", **here)
    assert (opened.status, states(opened)["permissions"]) == (1, "missing")
    assert states(bare_terminal("storage", "setup", "--json", **here))["permissions"] == "changed"
    full = bare_terminal("storage", "check", "--json", **{**here, "min_free_bytes": str(2**60)})
    assert (full.status, states(full)["free space"]) == (1, "missing")
    told = bare_terminal("storage", "policies", **here)
    assert (told.status, told.out, "no policies" in told.err) == (0, "", True)


def test_a_file_in_the_place_of_the_directory_is_named(bare_terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    ended = bare_terminal("storage", "setup", "--json", storage_url=f"file://{tmp_path / 'file' / 'files'}")
    assert (ended.status, states(ended)) == (1, {"directory": "denied"})
