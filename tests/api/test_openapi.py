"""The OpenAPI document: whole, and true, as far as generated requests can tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks

from tests.api.batch_rows import add_batch
from tests.api.document_rows import add_document, add_text
from tests.api.job_rows import advance, claim
from tests.api.live_service import LiveService, new_user, running_service, service_settings, token
from tests.api.photo_rows import add_photo
from upload_pipeline.errors import HTTP_STATUS, ErrorCode

EXAMPLES = 12
"""Generated requests of each route."""


@pytest.fixture
async def service(database: Any, tmp_path: Path) -> AsyncIterator[LiveService]:
    async with running_service(service_settings(database.worker_url, tmp_path)) as running:
        yield running


async def document(service: LiveService) -> dict[str, Any]:
    answer = await service.client().get("/openapi.json")
    assert answer.status_code == 200
    made: dict[str, Any] = answer.json()
    return made


def operations(made: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in made["paths"].items()
        for method, operation in methods.items()
    ]


async def test_every_error_has_the_common_body_and_an_example(service: LiveService) -> None:
    made = await document(service)
    for name, operation in operations(made):
        assert operation.get("summary"), name
        assert "422" not in operation["responses"], name
        for status, response in operation["responses"].items():
            assert response["description"], (name, status)
            assert "X-Correlation-ID" in response["headers"], (name, status)
            content = response.get("content", {}).get("application/json")
            if status >= "400" and content is not None and name != "GET /readyz":
                assert content["schema"] == {"$ref": "#/components/schemas/ErrorBody"}, (name, status)
                assert content["example"]["error"]["code"] in set(ErrorCode), (name, status)
                assert HTTP_STATUS[content["example"]["error"]["code"]] == int(status), (name, status)


async def test_what_stores_may_lack_the_room_and_what_changes_may_be_asked_by_another_site(
    service: LiveService,
) -> None:
    answers = {name: set(operation["responses"]) for name, operation in operations(await document(service))}
    for storing in (
        "/api/v2/upload",
        "/api/v1/policies/ingest",
        "/api/v1/documents/ingest/batch",
        "/api/v1/photos/upload-url",
    ):
        assert "507" in answers[f"POST {storing}"], storing
    changing = {name for name, statuses in answers.items() if "401" in statuses and not name.startswith("GET ")}
    assert "DELETE /api/v1/documents/ingest/batch/{batch_id}" in changing
    assert {name for name in changing if "403" not in answers[name]} == set()


async def test_every_body_is_typed_and_has_an_example(service: LiveService) -> None:
    made = await document(service)
    schemas = made["components"]["schemas"]
    for name, operation in operations(made):
        if "/api/" not in name:
            continue
        bodies = [response.get("content", {}) for response in operation["responses"].values()]
        bodies.append(operation.get("requestBody", {}).get("content", {}))
        for content in (body["application/json"] for body in bodies if "application/json" in body):
            schema = content["schema"]
            named = [part["$ref"] for part in schema.get("anyOf", [schema]) if "$ref" in part]
            assert named, (name, schema)
            for reference in named:
                target = schemas[reference.rsplit("/", 1)[1]]
                assert "example" in content or "examples" in target, (name, reference)


async def test_generated_requests_find_no_fault_and_no_undocumented_answer(
    service: LiveService, admin: asyncpg.Connection
) -> None:
    """Every route, with its documented examples and with bodies and parameters of every shape."""
    user = new_user()
    owned = await add_document(admin, service.resources.store, user)
    await advance(admin, await claim(admin, owned.job_id), "embedded")
    await add_text(admin, service.resources.store, owned, "Text.", chunks=1)
    await admin.execute(
        "insert into upload_pipeline.policies values ($1, $2, 'insurer', 'product', '2026-01-31')",
        owned.document_id,
        user,
    )
    made = await document(service)
    put_example(made, "job_id", str(owned.job_id))
    put_example(made, "document_id", str(owned.document_id))
    put_example(made, "batch_id", str(await add_batch(service.resources.db, user)))
    put_example(made, "photo_id", str(await add_photo(admin, user)))
    put_project_example(made, await admin.fetchval("select project_id from upload_pipeline.photos"))
    schema = schemathesis.openapi.from_dict(made)
    schema.config.base_url = service.url
    headers = {"Authorization": f"Bearer {token(user, app_metadata={'roles': ['ADMIN']})}"}
    chosen = [
        checks.not_a_server_error,
        schemathesis.checks.CHECKS.get_one("status_code_conformance"),
        schemathesis.checks.CHECKS.get_one("content_type_conformance"),
        schemathesis.checks.CHECKS.get_one("response_schema_conformance"),
        schemathesis.checks.CHECKS.get_one("response_headers_conformance"),
    ]
    asked: list[str] = []

    def fuzz() -> None:
        # what removes things comes last, so that there is something for the others
        for operation in sorted(
            (result.ok() for result in schema.get_all_operations()), key=lambda found: found.method == "delete"
        ):

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @schemathesis_given(operation)
            def one(case: Any) -> None:
                case.call_and_validate(headers=headers, checks=chosen, timeout=20)

            one()
            asked.append(operation.label)

    await asyncio.to_thread(fuzz)
    assert sorted(asked) == sorted(name for name, _ in operations(made))


def schemathesis_given(operation: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy())


def put_example(made: dict[str, Any], parameter: str, value: str) -> None:
    """Makes an id of something that is there an example, so that generated requests also reach what lies behind."""
    for _, operation in operations(made):
        for found in operation.get("parameters", []):
            if found["name"] == parameter:
                found["schema"] = {"enum": [value, "00000000-0000-4000-8000-00000000dead", "no id"]}


def put_project_example(made: dict[str, Any], project: Any) -> None:
    """Has announcements of photos name a project that is there."""
    made["components"]["schemas"]["PhotoUploadRequest"]["properties"]["project_id"]["enum"] = [
        str(project),
        "00000000-0000-4000-8000-00000000dead",
    ]
