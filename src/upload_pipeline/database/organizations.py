"""Organisations, their members and projects, as the terminal sets and lists them.

One function for each SQL function of `sql/schema/05_organizations.sql`, which tells what they do, and for each list.
All take a psycopg connection of role `upload_worker`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row

from upload_pipeline.database.queue import INVALID_STATE, NOT_FOUND
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from datetime import datetime

    from psycopg import Connection

ROLES = ("owner", "admin", "member", "viewer")
"""As the constraint `organization_members_role` has them, from those who may most."""


@dataclass(frozen=True, slots=True)
class Organization:
    """An organisation, and how large it is."""

    organization_id: UUID
    name: str
    members: int
    projects: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Member:
    """A user in an organisation."""

    user_id: UUID
    role: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Project:
    """A project of an organisation.

    Attributes:
        drop_gps: whether photos are handed out without the place where they were taken.
    """

    project_id: UUID
    organization_id: UUID
    organization: str
    name: str
    drop_gps: bool
    created_at: datetime


def add_organization(connection: Connection[Any], name: str, *, owner: UUID | None) -> UUID:
    """Makes an organisation, with its owner where one is named; its id.

    Raises:
        PipelineError: `INVALID_STATE` where the name is taken; `INVALID_ARGUMENT`.
    """
    with connection.transaction():
        organization: UUID = _call(connection, "select upload_pipeline.add_organization(%s)", name)
        if owner is not None:
            _call(connection, "select upload_pipeline.set_member(%s, %s, 'owner')", organization, owner)
    return organization


def list_organizations(connection: Connection[Any], *, limit: int) -> list[Organization]:
    """Organisations by name."""
    with connection.cursor(row_factory=class_row(Organization)) as cursor:
        return cursor.execute(
            """
            select o.organization_id, o.name, o.created_at,
                   (select count(*) from upload_pipeline.organization_members m
                     where m.organization_id = o.organization_id)::integer as members,
                   (select count(*) from upload_pipeline.projects p
                     where p.organization_id = o.organization_id)::integer as projects
              from upload_pipeline.organizations o
             order by o.name limit %s
            """,
            [limit],
        ).fetchall()


def find_organization(connection: Connection[Any], given: str) -> UUID:
    """The organisation that is named, by its id or by its name.

    Raises:
        PipelineError: `ORGANIZATION_NOT_FOUND`.
    """
    row = connection.execute(
        "select organization_id from upload_pipeline.organizations where organization_id::text = %s or name = %s",
        [given.lower(), given],
    ).fetchone()
    if row is None:
        raise PipelineError(
            ErrorCode.ORGANIZATION_NOT_FOUND,
            f"There is no organization {given!r}. `upload-pipeline organizations list` shows those that there are.",
            {"organization": given},
        )
    organization: UUID = row[0]
    return organization


def set_member(connection: Connection[Any], organization_id: UUID, user_id: UUID, role: str) -> None:
    """Makes a user a member with this role, or gives a member this role.

    Raises:
        PipelineError: `INVALID_STATE` where there would be no owner; `INVALID_ARGUMENT`; `ORGANIZATION_NOT_FOUND`.
    """
    _call(connection, "select upload_pipeline.set_member(%s, %s, %s)", organization_id, user_id, role)


def remove_member(connection: Connection[Any], organization_id: UUID, user_id: UUID) -> bool:
    """Ends a membership; False where there is none.

    Raises:
        PipelineError: `INVALID_STATE` where there would be no owner.
    """
    return bool(_call(connection, "select upload_pipeline.remove_member(%s, %s)", organization_id, user_id))


def list_members(connection: Connection[Any], organization_id: UUID, *, limit: int) -> list[Member]:
    """The members of an organisation, those who have been there longest first."""
    with connection.cursor(row_factory=class_row(Member)) as cursor:
        return cursor.execute(
            """
            select user_id, role, created_at from upload_pipeline.organization_members
             where organization_id = %s order by created_at, user_id limit %s
            """,
            [organization_id, limit],
        ).fetchall()


def add_project(connection: Connection[Any], organization_id: UUID, name: str, *, drop_gps: bool) -> UUID:
    """Makes a project; its id.

    Raises:
        PipelineError: `INVALID_STATE` where the organisation has one of that name; `INVALID_ARGUMENT`;
            `ORGANIZATION_NOT_FOUND`.
    """
    project: UUID = _call(connection, "select upload_pipeline.add_project(%s, %s, %s)", organization_id, name, drop_gps)
    return project


def set_project(connection: Connection[Any], project_id: UUID, *, name: str | None, drop_gps: bool | None) -> None:
    """Changes what is given of a project.

    Raises:
        PipelineError: `PROJECT_NOT_FOUND`; `INVALID_STATE` where the name is taken; `INVALID_ARGUMENT`.
    """
    _call(
        connection,
        "select upload_pipeline.set_project(%s, %s, %s)",
        project_id,
        name,
        drop_gps,
        missing=ErrorCode.PROJECT_NOT_FOUND,
    )


def list_projects(connection: Connection[Any], *, organization_id: UUID | None, limit: int) -> list[Project]:
    """Projects by organisation and name; of one organisation where one is named."""
    with connection.cursor(row_factory=class_row(Project)) as cursor:
        return cursor.execute(
            """
            select p.project_id, p.organization_id, o.name as organization, p.name, p.drop_gps, p.created_at
              from upload_pipeline.projects p
              join upload_pipeline.organizations o on o.organization_id = p.organization_id
             where %(organization)s::uuid is null or p.organization_id = %(organization)s::uuid
             order by o.name, p.name limit %(limit)s
            """,
            {"organization": organization_id, "limit": limit},
        ).fetchall()


def _call(
    connection: Connection[Any], query: str, *arguments: object, missing: ErrorCode = ErrorCode.ORGANIZATION_NOT_FOUND
) -> Any:
    try:
        row = connection.execute(query.encode(), arguments).fetchone()
    except psycopg.errors.CheckViolation as error:
        raise PipelineError(
            ErrorCode.INVALID_ARGUMENT,
            "A name has 1 to 200 characters, a user is not the nil UUID, and a role is one of: "
            + ", ".join(ROLES)
            + ".",
        ) from error
    except psycopg.Error as error:
        code = {NOT_FOUND: missing, INVALID_STATE: ErrorCode.INVALID_STATE}.get(error.sqlstate or "")
        if code is None:
            raise
        message = (error.diag.message_primary or str(error)).rstrip(".")
        hint = f" {error.diag.message_hint}" if error.diag.message_hint else ""
        raise PipelineError(code, f"{message[:1].upper()}{message[1:]}.{hint}") from error
    return row[0] if row else None
