"""Four workers on sixty documents, one killed every second: no job lost, no row missing, double or different."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.crash_run import QUICK_LEASES, crash_run
from tests.scenarios.world import World

LOST_BEFORE_GIVEN_UP = 4
"""Workers that a job loses in a row before it ends as a dead letter: the first and those of three retries."""


@pytest.fixture
def worlds(database: Any, second_database: Any, tmp_path: Path) -> Iterator[tuple[World, World]]:
    made = []
    for name, place in (("calm", database), ("stormy", second_database)):
        home = tmp_path / name
        home.mkdir()
        made.append(World(place.admin_url, place.worker_url, home, dict(QUICK_LEASES)))
    yield made[0], made[1]
    for world in made:
        world.kill_all()


@pytest.mark.parametrize(
    ("documents", "seed"), [(60, 1), pytest.param(600, 2, marks=pytest.mark.slow)], ids=["sixty", "six hundred"]
)
async def test_killing_workers_changes_no_row(worlds: tuple[World, World], documents: int, seed: int) -> None:
    calm, stormy = worlds
    report = await crash_run(calm, stormy, documents=documents, workers=4, seed=seed, seconds=documents * 4)
    assert report.states == {"done": documents}
    assert report.kills >= 3, "the storm was one"
    assert report.reaped >= 1, "and it hit jobs at work"
    assert report.given_up * LOST_BEFORE_GIVEN_UP <= report.reaped + report.given_up, "each was hit again and again"
    assert report.differences == []
