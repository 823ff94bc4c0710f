"""Somebody who follows one of the documents: its blocks are taken out and run, in a folder with the samples."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Reader:
    """An environment, and a folder with the samples."""

    environment: dict[str, str]
    folder: Path

    def run(self, command: list[str], script: str = "") -> str:
        """What a command writes; it must succeed."""
        ended = subprocess.run(
            command,
            input=script,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        return ended.stdout


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language in a document, in order."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"docs/{document} has no {language}"
    return found
