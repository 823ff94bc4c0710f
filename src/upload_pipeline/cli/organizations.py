"""`organizations add|list|members|set-member|remove-member` and `projects add|list|set`: who shares which photos."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated
from uuid import UUID

import typer

from upload_pipeline.cli.arguments import JsonOption, LimitOption, examples

OrganizationArgument = Annotated[
    str, typer.Argument(metavar="ORGANIZATION", help="Its id or its name.", show_default=False)
]
MemberOption = Annotated[UUID, typer.Option("--user", metavar="UUID", help="Who.", show_default=False)]


class Role(StrEnum):
    """What a member may do."""

    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"
    VIEWER = "viewer"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    organizations = typer.Typer(no_args_is_help=True, help="Make organisations, and say who is in them.")
    add = organizations.command("add", epilog=examples('upload-pipeline organizations add "Roofs Ltd" --owner 3f0c...'))
    add(add_organization_command)
    organizations.command("list", epilog=examples("upload-pipeline organizations list"))(list_organizations_command)
    members = organizations.command("members", epilog=examples('upload-pipeline organizations members "Roofs Ltd"'))
    members(list_members_command)
    organizations.command(
        "set-member",
        epilog=examples('upload-pipeline organizations set-member "Roofs Ltd" --user 3f0c... --role viewer'),
    )(set_member_command)
    organizations.command(
        "remove-member", epilog=examples('upload-pipeline organizations remove-member "Roofs Ltd" --user 3f0c...')
    )(remove_member_command)
    app.add_typer(organizations, name="organizations")

    projects = typer.Typer(no_args_is_help=True, help="Make and change the projects that photos belong to.")
    projects.command("add", epilog=examples('upload-pipeline projects add "Roofs Ltd" "Elm Street 5"'))(
        add_project_command
    )
    projects.command("list", epilog=examples('upload-pipeline projects list --organization "Roofs Ltd"'))(
        list_projects_command
    )
    projects.command("set", epilog=examples("upload-pipeline projects set 7c9e... --drop-gps"))(set_project_command)
    app.add_typer(projects, name="projects")


def add_organization_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that no other has.", show_default=False)],
    owner: Annotated[UUID | None, typer.Option("--owner", metavar="UUID", help="Its first owner.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an organisation."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import print_json, print_line
    from upload_pipeline.database.organizations import add_organization

    with reading_database() as connection:
        organization = add_organization(connection, name, owner=owner)
    if as_json:
        print_json({"organization_id": organization, "name": name, "owner": owner})
        return
    print_line(str(organization))


def list_organizations_command(limit: LimitOption = 100, as_json: JsonOption = False) -> None:
    """List organisations by name. With --json: one object a line."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import note, print_json, print_table, table
    from upload_pipeline.database.organizations import list_organizations

    with reading_database() as connection:
        found = list_organizations(connection, limit=limit)
    if as_json:
        for organization in found:
            print_json(organization)
    elif found:
        rows = [(str(each.organization_id), str(each.members), str(each.projects), each.name) for each in found]
        print_table(table(("ORGANIZATION", "MEMBERS", "PROJECTS", "NAME"), rows, spare=()))
    else:
        note("No organizations.")


def list_members_command(
    organization: OrganizationArgument, limit: LimitOption = 100, as_json: JsonOption = False
) -> None:
    """List who is in an organisation. With --json: one object a line."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import note, print_json, print_table, table
    from upload_pipeline.database.organizations import find_organization, list_members

    with reading_database() as connection:
        found = list_members(connection, find_organization(connection, organization), limit=limit)
    if as_json:
        for member in found:
            print_json(member)
    elif found:
        print_table(table(("USER", "ROLE"), [(str(each.user_id), each.role) for each in found], spare=()))
    else:
        note("No members.")


def set_member_command(
    organization: OrganizationArgument,
    user: MemberOption,
    role: Annotated[Role, typer.Option("--role", help="What they may do.")] = Role.MEMBER,
    as_json: JsonOption = False,
) -> None:
    """Make a user a member, or change a member's role. There is always an owner."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import print_json, print_line
    from upload_pipeline.database.organizations import find_organization, set_member

    with reading_database() as connection:
        found = find_organization(connection, organization)
        set_member(connection, found, user, role)
    if as_json:
        print_json({"organization_id": found, "user_id": user, "role": role})
        return
    print_line(f"{user} is {role} of {organization}.")


def remove_member_command(organization: OrganizationArgument, user: MemberOption, as_json: JsonOption = False) -> None:
    """End a membership. What the user has uploaded stays the organisation's."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import print_json, print_line
    from upload_pipeline.database.organizations import find_organization, remove_member

    with reading_database() as connection:
        found = find_organization(connection, organization)
        removed = remove_member(connection, found, user)
    if as_json:
        print_json({"organization_id": found, "user_id": user, "removed": removed})
        return
    print_line(f"{user} is in {organization} no more." if removed else f"{user} was not in {organization}.")


def add_project_command(
    organization: OrganizationArgument,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name that no other of its projects has.", show_default=False)
    ],
    drop_gps: Annotated[
        bool, typer.Option("--drop-gps", help="Hand photos out without the place where they were taken.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a project of an organisation."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import print_json, print_line
    from upload_pipeline.database.organizations import add_project, find_organization

    with reading_database() as connection:
        found = find_organization(connection, organization)
        project = add_project(connection, found, name, drop_gps=drop_gps)
    if as_json:
        print_json({"project_id": project, "organization_id": found, "name": name, "drop_gps": drop_gps})
        return
    print_line(str(project))


def list_projects_command(
    organization: Annotated[
        str | None,
        typer.Option("--organization", metavar="ORGANIZATION", help="Only those of it, by id or name."),
    ] = None,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """List projects by organisation and name. With --json: one object a line."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import note, print_json, print_table, table
    from upload_pipeline.database.organizations import find_organization, list_projects

    with reading_database() as connection:
        only = None if organization is None else find_organization(connection, organization)
        found = list_projects(connection, organization_id=only, limit=limit)
    if as_json:
        for project in found:
            print_json(project)
    elif found:
        rows = [
            (str(each.project_id), "dropped" if each.drop_gps else "kept", each.organization, each.name)
            for each in found
        ]
        print_table(table(("PROJECT", "PLACE", "ORGANIZATION", "NAME"), rows, spare=()))
    else:
        note("No projects.")


def set_project_command(
    project: Annotated[
        UUID, typer.Argument(metavar="PROJECT_ID", help="As `projects list` shows it.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Another name.")] = None,
    drop_gps: Annotated[
        bool | None,
        typer.Option("--drop-gps/--keep-gps", help="Whether photos that come from now on are to tell no place."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Change a project. Photos that were processed before stay as they are."""
    from upload_pipeline.cli.opening import reading_database
    from upload_pipeline.cli.output import print_json, print_line
    from upload_pipeline.database.organizations import set_project

    with reading_database() as connection:
        set_project(connection, project, name=name, drop_gps=drop_gps)
    if as_json:
        print_json({"project_id": project, "name": name, "drop_gps": drop_gps})
        return
    print_line(f"Project {project} is changed.")
