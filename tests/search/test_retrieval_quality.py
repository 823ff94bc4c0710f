"""Whether people find what they ask for: recall and rank of the passage that answers, in each mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from retrieval_questions import CORPUS_FILES, CORPUS_QUESTIONS, SAMPLE_QUESTIONS, Question
from sample_documents import make_document

from upload_pipeline.media_types import HEAD_BYTES, detect_media_type
from upload_pipeline.providers.local_parser import LocalParser
from upload_pipeline.search.query import SearchMode, SearchResult, search
from upload_pipeline.text.chunker import ChunkOptions
from upload_pipeline.text.normalise import normalise_markdown

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"

DISTRACTORS = 40
"""Claim files of the same words and subjects, none of which answers anything."""


@dataclass(frozen=True)
class Figures:
    """Over all questions.

    Attributes:
        recall: share of questions whose passage is in the first five hits.
        reciprocal_rank: mean of 1 / place of the first hit that holds it, of ten hits; 0 where none does.
        missed: the questions of which the first five hits hold none.
    """

    recall: float
    reciprocal_rank: float
    missed: tuple[str, ...]


async def fill(library, user: UUID, paths: Sequence[Path], options: ChunkOptions) -> None:
    parser = LocalParser(timeout=60.0, memory_bytes=1024**3)
    try:
        for path in paths:
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
            media_type = detect_media_type(path.name, head, size=path.stat().st_size)
            parsed = await parser.parse(path, media_type)
            normalised = normalise_markdown(parsed.markdown, paged=parsed.page_count is not None)
            await library.add(user, path.name, normalised.text, page_starts=normalised.page_starts, options=options)
    finally:
        parser.close()


async def measure(db, models, user: UUID, questions: Sequence[Question], mode: SearchMode) -> Figures:
    places = []
    for question in questions:
        result = await search(db, models, user_id=user, query=question.text, limit=10, mode=mode)
        places.append(place(result, question))
    return Figures(
        sum(1 <= found <= 5 for found in places) / len(places),
        sum(1 / found for found in places if found) / len(places),
        tuple(question.text for question, found in zip(questions, places, strict=True) if not 1 <= found <= 5),
    )


def place(result: SearchResult, question: Question) -> int:
    """Place of the first hit that answers, from 1; 0 where none does."""
    passage = "".join(question.passage.split())
    for number, hit in enumerate(result.hits, 1):
        if hit.filename == question.filename and passage in "".join(hit.text.split()):
            return number
    return 0


async def assert_hybrid_is_best(db, models, user, questions, *, recall: float, reciprocal_rank: float) -> None:
    figures = {mode: await measure(db, models, user, questions, mode) for mode in SearchMode}
    hybrid = figures[SearchMode.HYBRID]
    for mode in (SearchMode.VECTOR, SearchMode.TEXT):
        assert hybrid.recall >= figures[mode].recall, figures
    assert hybrid.recall >= recall, hybrid
    assert hybrid.reciprocal_rank >= reciprocal_rank, hybrid


async def test_every_passage_is_in_the_texts(library, user, db, models):
    await fill(library, user, sorted(SAMPLES.glob("*.*")), ChunkOptions(400, 40, 2000))
    for question in SAMPLE_QUESTIONS:
        everything = await search(db, models, user_id=user, query=question.text, limit=1000, mode="vector")
        assert place(everything, question), question


async def test_hybrid_search_finds_answers_in_the_samples_among_claim_files(library, user, db, models):
    # Small chunks, so that there are enough of them for finding to be work.
    options = ChunkOptions(400, 40, 2000)
    samples = [path for path in sorted(SAMPLES.glob("*.*")) if path.suffix != ".docx"]  # the policy as PDF is there
    await fill(library, user, samples, options)
    for seed in range(DISTRACTORS):
        text = make_document("md", seed).decode()
        await library.add(user, f"claim-{seed}.md", text, options=options)
    # Measured: hybrid 0.875 and 0.748, vector 0.700 and 0.577, text 0.825 and 0.705. One question is 0.025.
    await assert_hybrid_is_best(db, models, user, SAMPLE_QUESTIONS, recall=0.85, reciprocal_rank=0.72)


async def test_hybrid_search_finds_answers_in_real_insurance_files(library, user, db, models, corpus):
    await fill(library, user, [corpus / name for name in CORPUS_FILES], ChunkOptions())
    for question in CORPUS_QUESTIONS:
        everything = await search(db, models, user_id=user, query=question.text, limit=1000, mode="vector")
        assert place(everything, question), question
    # Measured: hybrid 0.885 and 0.826, vector 0.769 and 0.660, text 0.885 and 0.835. One question is 0.038.
    await assert_hybrid_is_best(db, models, user, CORPUS_QUESTIONS, recall=0.84, reciprocal_rank=0.78)
