"""What `storage setup` and `storage check` say of a part of a store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "changed", "missing", "denied", "not offered", "not looked at"]


@dataclass(frozen=True, slots=True)
class StorePart:
    """A part of a store, and how it is.

    Attributes:
        part: in a word or two.
        state: `ok` as it should be, `changed` made so just now, `missing` it is not and nobody made it so, `denied`
            these credentials may not look or change it, `not offered` this kind of store has no such thing, `not looked
            at` it may be well or not: it is for others to say.
        message: what was found; where it is not well, what to do.
    """

    part: str
    state: State
    message: str

    @property
    def well(self) -> bool:
        """Whether nothing is known that is left to do."""
        return self.state not in ("missing", "denied")


def all_well(parts: Iterable[StorePart]) -> bool:
    """Whether nothing is left to do about any of them, as far as anybody has looked."""
    return all(part.well for part in parts)
