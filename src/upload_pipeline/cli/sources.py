"""From the paths on a command line to the files that they stand for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def expand(paths: Sequence[Path], *, recursive: bool) -> list[Path]:
    """The files to take in, in the order given, folders sorted by name, each file once.

    A folder stands for the regular files at its top level, with `recursive` for those below it too. What is hidden
    (a name that begins with a dot) is left out of folders, and so are links to folders. A path that is no folder is
    taken as it is, whatever it names: intake says what is wrong with it.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for file in _in_folder(path, recursive=recursive) if path.is_dir() else (path,):
            found.setdefault(os.path.abspath(file), file)  # noqa: PTH100 - unlike resolve() it keeps links apart
    return list(found.values())


def _in_folder(folder: Path, *, recursive: bool) -> Iterator[Path]:
    # Without an error handler os.walk would pass over a folder that cannot be read, and its files with it.
    for directory, folders, files in os.walk(folder, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if recursive and not name.startswith("."))
        for name in sorted(files):
            file = Path(directory) / name
            if not name.startswith(".") and file.is_file():
                yield file


def _unreadable(error: OSError) -> None:
    raise error
