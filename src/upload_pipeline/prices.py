"""What the use of hosted providers costs, by a table that the operator keeps: the setting `PRICES`."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

PRICE_UNITS: Mapping[str, int] = {"tokens": 1_000_000, "pages": 1000, "credits": 1000, "requests": 1000}
"""What a price is for: US dollars for so many."""

LOCAL = "local"
"""The provider that costs nothing unless a price is set."""

PriceTable = Mapping[str, Mapping[str, float]]
"""Prices by `<provider>/<model>` and unit."""

_MICROS = 1_000_000
_PLACES = Decimal("0.000001")


def check_prices(table: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises `ValueError` that says which entry is wrong and what is allowed."""
    for name, prices in table.items():
        provider, slash, model = name.partition("/")
        if not provider or not slash or not model:
            raise ValueError(f'"{name}" is no model of a provider: write "<provider>/<model>"')
        if not prices:
            raise ValueError(f'"{name}" has no price: {_allowed()}')
        for unit, price in prices.items():
            if unit not in PRICE_UNITS:
                raise ValueError(f'"{name}" has a price for "{unit}": {_allowed()}')
            if not 0 <= price < 1_000_000:
                raise ValueError(f'"{name}" has the price {price:g} for {unit}: it is in US dollars, and not below 0')


def cost_micros(
    table: PriceTable, *, provider: str, model: str, tokens: int, pages: int, credits_taken: Decimal, requests: int
) -> Decimal | None:
    """What a use costs, in millionths of a US dollar; None where nobody knows: a hosted model that has no price.

    The price of `<provider>/<model>` holds for each `<provider>/<model>/<version>` that has none of its own.
    """
    used = {"tokens": Decimal(tokens), "pages": Decimal(pages), "credits": credits_taken, "requests": Decimal(requests)}
    if not any(used.values()):
        return Decimal(0)
    prices = table.get(f"{provider}/{model}", table.get(f"{provider}/{model.rpartition('/')[0]}"))
    if prices is None:
        return Decimal(0) if provider == LOCAL else None
    # by way of its text: 0.02 is what the operator wrote, and not the nearest binary fraction
    total = sum(used[unit] * Decimal(str(price)) * _MICROS / PRICE_UNITS[unit] for unit, price in prices.items())
    return Decimal(total).quantize(_PLACES)


def _allowed() -> str:
    parts = [f'"{unit}" (for {count:,})' for unit, count in PRICE_UNITS.items()]
    return f"prices are in US dollars for {', '.join(parts)}"
