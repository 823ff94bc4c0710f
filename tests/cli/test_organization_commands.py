"""Organisations, their members and projects, made and listed from the terminal."""

from __future__ import annotations

from uuid import UUID, uuid4

from command_runs import Terminal


def made(terminal: Terminal, user: str) -> tuple[str, str]:
    """A new organisation of this owner: its name and id."""
    name = f"Roofs {uuid4()}"
    organization = terminal("organizations", "add", name, "--owner", user).out.strip()
    assert UUID(organization)
    return name, organization


def test_an_organization_is_made_and_its_members_are_set(terminal: Terminal, user: str) -> None:
    name, organization = made(terminal, user)
    colleague = str(uuid4())
    set_role = ("organizations", "set-member", name, "--user", colleague)
    assert terminal(*set_role).out == f"{colleague} is member of {name}.\n"
    changed = terminal(*set_role, "--role", "viewer", "--json").object()
    assert changed == {"organization_id": organization, "user_id": colleague, "role": "viewer"}
    listed = terminal("organizations", "members", organization.upper(), "--json").lines()
    assert [(member["user_id"], member["role"]) for member in listed] == [(user, "owner"), (colleague, "viewer")]
    assert colleague in terminal("organizations", "members", name).out
    (one,) = [each for each in terminal("organizations", "list", "--json").lines() if each["name"] == name]
    assert (one["organization_id"], one["members"], one["projects"]) == (organization, 2, 0)
    assert name in terminal("organizations", "list").out
    remove = ("organizations", "remove-member", name, "--user", colleague)
    assert [terminal(*remove, "--json").object()["removed"] for _ in range(2)] == [True, False]
    assert "was not in" in terminal(*remove).out


def test_projects_are_made_listed_and_changed(terminal: Terminal, user: str) -> None:
    name, organization = made(terminal, user)
    project = terminal("projects", "add", name, "Elm Street 5").out.strip()
    second = terminal("projects", "add", organization, "Ash Road", "--drop-gps", "--json").object()
    assert second["drop_gps"] is True

    def listed() -> dict[str, tuple[str, bool]]:
        lines = terminal("projects", "list", "--organization", name, "--json").lines()
        return {line["project_id"]: (line["name"], line["drop_gps"]) for line in lines}

    assert listed() == {project: ("Elm Street 5", False), second["project_id"]: ("Ash Road", True)}
    assert terminal("projects", "set", project, "--drop-gps").status == 0
    assert listed()[project] == ("Elm Street 5", True)
    terminal("projects", "set", project, "--keep-gps", "--name", "Elm Street 7")
    assert listed()[project] == ("Elm Street 7", False)
    assert "dropped" in terminal("projects", "list").out


def test_what_is_not_there_taken_or_would_leave_no_owner_is_refused(terminal: Terminal, user: str) -> None:
    name, _ = made(terminal, user)
    project = terminal("projects", "add", name, "Elm Street 5").out.strip()
    terminal("organizations", "set-member", name, "--user", uuid4())
    for arguments, code, said in (
        (("organizations", "add", name), "INVALID_STATE", "already"),
        (("organizations", "add", ""), "INVALID_ARGUMENT", "1 to 200 characters"),
        (("organizations", "add", f"x{uuid4()}", "--owner", str(UUID(int=0))), "INVALID_ARGUMENT", "nil UUID"),
        (("organizations", "members", "nowhere"), "ORGANIZATION_NOT_FOUND", "organizations list"),
        (("organizations", "set-member", name, "--user", user), "INVALID_STATE", "no owner"),
        (("organizations", "remove-member", name, "--user", user), "INVALID_STATE", "no owner"),
        (("projects", "add", "nowhere", "a"), "ORGANIZATION_NOT_FOUND", "nowhere"),
        (("projects", "add", name, "Elm Street 5"), "INVALID_STATE", "already"),
        (("projects", "set", uuid4(), "--name", "a"), "PROJECT_NOT_FOUND", "projects list"),
        (("projects", "set", project, "--name", ""), "INVALID_ARGUMENT", "1 to 200"),
        (("projects", "list", "--organization", "nowhere"), "ORGANIZATION_NOT_FOUND", "nowhere"),
    ):
        ended = terminal(*arguments)
        assert ended.status != 0, arguments
        assert code in ended.err, (arguments, ended.err)
        assert said in ended.err, (arguments, ended.err)
    # nothing of the organization whose owner was refused
    assert all(each["members"] for each in terminal("organizations", "list", "--json").lines())
    assert terminal("organizations", "set-member", name, "--user", user, "--role", "king").status == 2
