from __future__ import annotations

from pathlib import Path

import pytest

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.settings import load_settings
from upload_pipeline.storage_address import (
    AzureContainer,
    Bucket,
    Directory,
    GoogleBucket,
    SupabaseBucket,
    parse_storage_url,
)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("file:///var/lib/x", Directory(Path("/var/lib/x"))),
        ("file:///with space%20", Directory(Path("/with space%20"))),
        ("s3://bucket", Bucket("bucket", "")),
        ("s3://bucket/", Bucket("bucket", "")),
        ("s3://my.buck-et/a/b", Bucket("my.buck-et", "a/b")),
        ("s3://bucket/a/b//", Bucket("bucket", "a/b")),
        ("gs://my_bucket.example.com/a/", GoogleBucket("my_bucket.example.com", "a")),
        ("gs://bucket", GoogleBucket("bucket", "")),
        ("az://my-files/a/b", AzureContainer("my-files", "a/b")),
        ("supabase://abcdefghijklmnopqrst/b", SupabaseBucket("https://abcdefghijklmnopqrst.supabase.co", "b", "")),
        ("supabase://files.example.com/My_files/a/", SupabaseBucket("https://files.example.com", "My_files", "a")),
        ("supabase://kong:8443/files", SupabaseBucket("https://kong:8443", "files", "")),
        ("supabase+http://kong/files/a/b", SupabaseBucket("http://kong", "files", "a/b")),
        ("supabase+http://[::1]:54321/files", SupabaseBucket("http://[::1]:54321", "files", "")),
    ],
)
def test_a_url_names_a_directory_or_a_bucket(url, address):
    assert parse_storage_url(url) == address


BAD = [
    "bucket",
    "gcs://bucket",
    "gs://",
    "gs://Bucket",
    "gs://bucket/a b",
    "gs://key:hunter2@bucket",
    "az://my_files",
    "az://my--files",
    "az://-files",
    "az://ab",
    "az://files/../b",
    "azure://files",
    "S3://bucket",
    "s3:bucket",
    "s3://",
    "s3:///prefix",
    "s3://ab",
    "s3://Bucket",
    "s3://bucket?region=x",
    "s3://bucket:9000",
    "s3://key:hunter2@bucket",
    "s3://bucket//a",
    "s3://bucket/a//b",
    "s3://bucket/../b",
    "s3://bucket/.hidden",
    "s3://bucket/a b",
    "s3://bucket/é",
    "s3://bucket/" + "a" * 513,
    "s3://bucket/a\0",
    "supabase://",
    "supabase://abcdefghijklmnopqrst",
    "supabase://abcdefghijklmnopqrst/",
    "supabase:///files",
    "supabase://key:hunter2@host/files",
    "supabase://host:port/files",
    "supabase://a b/files",
    "supabase://abcdefghijklmnopqrst/a b",
    "supabase://abcdefghijklmnopqrst/files/../b",
    "supabase+https://host/files",
    "file://relative",
    "file:///",
]


@pytest.mark.parametrize("url", BAD)
def test_a_url_that_names_nothing_is_refused_with_what_is_allowed(url):
    with pytest.raises(ValueError, match=r"file:///|s3://|supabase://<project>/|gs://|az://|512"):
        parse_storage_url(url)


@pytest.mark.parametrize("url", ["ftp://bucket", "s3://key:hunter2@bucket"])
def test_settings_refuse_it_at_the_start_and_show_no_password(url, tmp_path):
    with pytest.raises(PipelineError) as caught:
        load_settings(home=tmp_path, storage_url=url)
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert "UPLOAD_PIPELINE_STORAGE_URL=" in caught.value.message
    assert "s3://<bucket>[/<prefix>]" in caught.value.message
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    "endpoint", ["files.example.com", "s3://x", "https://", "https://user:hunter2@x", "https://x/path"]
)
def test_a_public_endpoint_is_a_scheme_and_a_host(endpoint, tmp_path):
    load_settings(home=tmp_path, storage_public_endpoint="https://files.example.com:9000/")
    with pytest.raises(PipelineError) as caught:
        load_settings(home=tmp_path, storage_public_endpoint=endpoint)
    assert "UPLOAD_PIPELINE_STORAGE_PUBLIC_ENDPOINT=" in caught.value.message
    assert "hunter2" not in caught.value.message
