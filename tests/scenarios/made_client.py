"""A Python client made from the service's OpenAPI document, as anybody would make one."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

PACKAGE = "made_client_of_the_service"


@contextmanager
def made_client(service_url: str, folder: Path) -> Iterator[Any]:
    """The package of the client, importable while entered; `load` reaches its modules."""
    folder.mkdir(parents=True)
    document = folder / "openapi.json"
    document.write_text(json.dumps(httpx.get(f"{service_url}/openapi.json").raise_for_status().json()))
    command = [sys.executable, "-W", "ignore", "-m", "openapi_python_client", "generate", "--path", str(document)]
    ended = subprocess.run(
        [*command, "--meta", "none", "--output-path", str(folder / PACKAGE)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    # It leaves out what it cannot make sense of, and says so; the formatter that it may lack is no part of the client.
    assert "WARNING" not in ended.stdout.replace("ruff is not in PATH", ""), ended.stdout
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(PACKAGE)
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


def operation(tag: str, name: str) -> Any:
    """The module of an operation, with `asyncio` and `asyncio_detailed`."""
    return importlib.import_module(f"{PACKAGE}.api.{tag}.{name}")


def models() -> Any:
    """The bodies."""
    return importlib.import_module(f"{PACKAGE}.models")


def types() -> Any:
    """`File`, `UNSET`."""
    return importlib.import_module(f"{PACKAGE}.types")
