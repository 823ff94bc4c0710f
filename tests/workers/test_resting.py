"""How long a worker leaves alone what fails."""

from __future__ import annotations

from upload_workers.resting import Rest


def test_each_rest_is_twice_as_long_as_the_one_before_until_it_works() -> None:
    now = 100.0
    rest = Rest(15.0, 50.0, lambda: now)
    assert rest.left == 0
    lengths = []
    for _ in range(4):
        assert rest.begin()
        assert not rest.begin(), "one that failed at the same moment"
        lengths.append(rest.left)
        now += rest.left
        assert rest.left == 0
    assert lengths == [15, 30, 50, 50]
    rest.begin()
    rest.end()
    assert rest.left == 0
    assert rest.begin()
    assert rest.left == 15
