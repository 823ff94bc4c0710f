from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from postgres_servers import FAST, temporary_home

from upload_pipeline.database.embedded import EmbeddedDatabase, embedded_status, ensure_embedded, stop_embedded
from upload_pipeline.errors import ErrorCode, PipelineError

NOBODY = 65534

START_IN_A_PROCESS = """
import sys
from pathlib import Path
from upload_pipeline.database.embedded import EmbeddedOptions, ensure_embedded
print(ensure_embedded(Path(sys.argv[1]), EmbeddedOptions(durable=False)).pid)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with temporary_home() as made:
        yield made


@pytest.fixture(scope="module")
def shared_home() -> Iterator[Path]:
    """A home whose server is started once, for tests that leave it running."""
    with temporary_home() as made:
        ensure_embedded(made, FAST)
        yield made


def ask(database: EmbeddedDatabase, query: str) -> object:
    with psycopg.connect(database.admin_url, autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def remember(database: EmbeddedDatabase) -> None:
    with psycopg.connect(database.admin_url) as connection:
        connection.execute("create table kept as select 7 as value")


def start_in_a_process(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START_IN_A_PROCESS, str(home)], stdout=subprocess.PIPE, text=True, cwd=home
    )


def owner_of_data(home: Path) -> int:
    return (home / "postgres").stat().st_uid


def test_gives_a_postgres_18_with_its_database_and_no_tcp(shared_home: Path) -> None:
    database = ensure_embedded(shared_home)

    assert ask(database, "show server_version").__str__().startswith("18")
    assert ask(database, "select current_database()") == "upload_pipeline"
    assert ask(database, "show listen_addresses") == ""
    assert ask(database, "show max_connections") == "200"
    assert ask(database, "select count(*) from pg_available_extensions where name = 'vector'") == 1


def test_folds_letters_beyond_ascii(shared_home: Path) -> None:
    database = ensure_embedded(shared_home)

    assert ask(database, "select to_tsvector('simple', 'ÜBER ÉTUDE')::text") == "'étude':2 'über':1"


def test_second_call_finds_the_same_server(shared_home: Path) -> None:
    assert ensure_embedded(shared_home) == ensure_embedded(shared_home)


def test_stops_once_and_keeps_the_data(home: Path) -> None:
    remember(ensure_embedded(home, FAST))

    assert stop_embedded(home) is True
    assert stop_embedded(home) is False
    assert embedded_status(home).pid is None
    assert ask(ensure_embedded(home, FAST), "select value from kept") == 7


def test_status_of_an_empty_home_makes_nothing(tmp_path: Path) -> None:
    status = embedded_status(tmp_path / "none")

    assert (status.version, status.pid, status.ready) == (None, None, False)
    assert stop_embedded(tmp_path / "none") is False
    assert list(tmp_path.iterdir()) == []


def test_server_outlives_the_process_that_started_it(home: Path) -> None:
    process = start_in_a_process(home)
    pid = int(process.communicate(timeout=60)[0])

    assert embedded_status(home).pid == pid
    assert ensure_embedded(home).pid == pid


def test_processes_that_start_at_once_share_one_server(home: Path) -> None:
    processes = [start_in_a_process(home) for _ in range(4)]
    pids = {process.communicate(timeout=60)[0].strip() for process in processes}

    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert pids == {str(embedded_status(home).pid)}


def test_heals_after_the_server_was_killed(home: Path) -> None:
    first = ensure_embedded(home)
    assert [ask(first, f"show {name}") for name in ("fsync", "full_page_writes", "synchronous_commit")] == ["on"] * 3
    remember(first)
    with psycopg.connect(first.admin_url):  # a client's backend outlives its server for a moment
        os.kill(first.pid, signal.SIGKILL)
        second = ensure_embedded(home)

    assert second.pid != first.pid
    assert ask(second, "select value from kept") == 7


def test_heals_when_another_program_has_the_dead_servers_number(home: Path) -> None:
    first = ensure_embedded(home, FAST)
    remember(first)
    recorded = (home / "postgres" / "postmaster.pid").read_text()
    stop_embedded(home)
    # As after a reboot: the file is there, and its number belongs to somebody else, who must be left in peace.
    bystander = subprocess.Popen(["/bin/sleep", "60"], user=owner_of_data(home), cwd="/")
    try:
        (home / "postgres" / "postmaster.pid").write_text(recorded.replace(str(first.pid), str(bystander.pid), 1))
        lock = home / "postgres" / ".s.PGSQL.5432.lock"
        lock.write_text(f"{bystander.pid}\n")
        assert embedded_status(home).pid is None

        assert ask(ensure_embedded(home, FAST), "select value from kept") == 7
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_heals_after_initdb_was_killed(home: Path) -> None:
    half = home / ".postgres-new-abc"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")

    ensure_embedded(home, FAST)

    assert not half.exists()


def test_a_server_whose_folder_was_deleted_does_not_disturb_the_next(home: Path) -> None:
    first = ensure_embedded(home, FAST)
    shutil.rmtree(home / "postgres")
    second = ensure_embedded(home, FAST)

    gone = not psutil.pid_exists(first.pid) or psutil.Process(first.pid).status() == psutil.STATUS_ZOMBIE
    assert gone
    assert ask(second, "select 1") == 1


@pytest.mark.parametrize(
    "name", ["a folder, with \"odd\" $(names) 'é'", "long-" + "x" * 150], ids=["odd characters", "long"]
)
def test_works_below_any_path(home: Path, name: str) -> None:
    below = home / name
    database = ensure_embedded(below, FAST)
    try:
        assert len(f"{database.socket_directory}/.s.PGSQL.5432") <= 103
        assert database.socket_directory.stat().st_mode & 0o077 == 0
        assert ask(database, "show data_directory") == str(below / "postgres")
        assert ensure_embedded(below) == database
    finally:
        assert stop_embedded(below)
    assert not (database.socket_directory / ".s.PGSQL.5432").exists()
    assert database.socket_directory == below / "postgres" or not database.socket_directory.exists()


def test_refuses_a_socket_folder_of_somebody_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder that belongs to another user")
    monkeypatch.setattr("tempfile.tempdir", str(home))
    below = home / "a folder"
    database = ensure_embedded(below, FAST)
    stop_embedded(below)
    database.socket_directory.mkdir()
    os.chown(database.socket_directory, NOBODY, NOBODY)

    with pytest.raises(PipelineError, match="belongs to another user"):
        ensure_embedded(below, FAST)


def under_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "home"


def the_file_itself(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


@pytest.mark.parametrize("make", [under_a_file, the_file_itself])
def test_home_that_cannot_be_made_is_named(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(PipelineError, match="UPLOAD_PIPELINE_HOME") as caught:
        ensure_embedded(make(tmp_path))

    assert caught.value.code is ErrorCode.SETTING_INVALID


def test_folder_that_is_no_database_is_left_alone(home: Path) -> None:
    (home / "postgres").mkdir()
    (home / "postgres" / "letter.txt").write_text("dear")

    with pytest.raises(PipelineError, match="not a Postgres data directory"):
        ensure_embedded(home, FAST)
    assert (home / "postgres" / "letter.txt").read_text() == "dear"


def test_failing_start_says_what_the_server_said(home: Path) -> None:
    ensure_embedded(home, FAST)
    stop_embedded(home)
    with (home / "postgres" / "postgresql.auto.conf").open("a") as file:
        file.write("max_connections = 'many'\n")

    with pytest.raises(PipelineError, match="max_connections") as caught:
        ensure_embedded(home, FAST)
    assert caught.value.code is ErrorCode.DATABASE_UNAVAILABLE


def test_ordinary_user_runs_it_and_root_runs_the_users(home: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can turn into another user")
    os.chown(home, NOBODY, NOBODY)
    home.chmod(0o755)
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            ensure_embedded(home, FAST)
        except BaseException as error:  # noqa: BLE001 - a fork of pytest must not return into it
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

    assert (home / "postgres").stat().st_uid == NOBODY
    assert psutil.Process(ensure_embedded(home).pid).uids().real == NOBODY
    assert stop_embedded(home)
    assert psutil.Process(ensure_embedded(home, FAST).pid).uids().real == NOBODY
