from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from tests.simulators.openai_embeddings import count_tokens
from upload_pipeline.providers.request_packing import bound_tokens, pack


@given(st.text(max_size=500) | st.text("a0 ", max_size=50))
@example("a0a")
def test_the_bound_is_no_less_than_the_server_counts(text: str) -> None:
    assert bound_tokens(text) >= count_tokens(text)
    assert bound_tokens(text) >= len(text.encode()) / 4


def test_english_is_bounded_by_six_tenths_of_a_token_a_letter() -> None:
    text = "The deductible for water damage is 1,500 USD for each loss, unless the endorsement says otherwise. " * 20
    assert 0.25 * len(text) < bound_tokens(text) < 0.6 * len(text)


@given(st.lists(st.text(max_size=40), max_size=40), st.integers(1, 10), st.integers(1, 60))
def test_parts_follow_one_another_and_keep_both_limits(texts: list[str], most: int, tokens: int) -> None:
    parts = list(pack(texts, most=most, tokens=tokens))
    assert [position for start, end in parts for position in range(start, end)] == list(range(len(texts)))
    for start, end in parts:
        assert 1 <= end - start <= most
        assert end - start == 1 or sum(bound_tokens(text) for text in texts[start:end]) <= tokens


def test_a_text_that_is_too_large_is_a_part_of_its_own() -> None:
    assert list(pack(["a", "1" * 100, "b"], most=10, tokens=50)) == [(0, 1), (1, 2), (2, 3)]
