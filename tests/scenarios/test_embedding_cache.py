"""A text is paid for once for a user: the simulator's books, whatever becomes of document, chunk size and worker."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from pathlib import Path
from uuid import UUID, uuid4

from tests.scenarios.paid_world import rows, run_command
from tests.scenarios.world import World
from tests.simulators.openai_embeddings import OpenAISimulator

WORDS = ("water", "damage", "roof", "hail", "premium", "claim", "policy", "insurer", "repair", "pipe", "wind", "loss")


def long_document(path: Path, *, sections: int, first: int = 0) -> Path:
    """Sections of some 800 and 1,700 characters in turn, each with words of its own."""
    parts = []
    for number in range(first, first + sections):
        sentence = " ".join(f"{word} {number * 7 + place}" for place, word in enumerate(WORDS))
        parts.append(
            f"# Section {number}\n\n" + "\n\n".join(f"{line}. {sentence}." for line in range(6 + 8 * (number % 2)))
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts))
    return path


async def live_texts(world: World, user: UUID) -> Counter[str]:
    chunks = await rows(
        world,
        f"select text from upload_pipeline.document_chunks where live and user_id = '{user}'",
    )
    return Counter(row["text"] for row in chunks)


async def vectors(world: World) -> dict[tuple[UUID, str], bytes]:
    chunks = await rows(
        world,
        """
        select user_id, text, extensions.vector_send(embedding) as bits from upload_pipeline.document_chunks where live
        """,
    )
    return {(row["user_id"], row["text"]): row["bits"] for row in chunks}


async def costs(world: World, document: UUID) -> dict[str, int]:
    (row,) = await rows(
        world,
        f"""
        select results -> 'cost' as cost from upload_pipeline.job_outcomes
          join upload_pipeline.upload_jobs using (job_id) where document_id = '{document}' order by seq desc limit 1
        """,
    )
    cost: dict[str, int] = json.loads(row["cost"])
    return cost


async def test_a_text_is_paid_for_once_for_each_user_whatever_becomes_of_its_document(
    world: World, simulator: OpenAISimulator
) -> None:
    mine, other = uuid4(), uuid4()
    path = long_document(world.home / "files" / "a.md", sections=12)
    world.start_worker()
    (document, _) = await world.ingest([(path, mine), (path, other)])
    assert await world.until_ended(120) == {"done": 2}
    texts = await live_texts(world, mine)
    assert len(texts) >= 12
    assert simulator.books.paid == Counter(dict.fromkeys(texts, 2)), "each user pays"
    first = await vectors(world)

    # deleted, and uploaded again
    await rows(world, f"select upload_pipeline.begin_deletion('{document}')")
    await rows(world, f"select upload_pipeline.finish_deletion('{document}')")
    assert await world.ingest([(path, mine)]) == [document]
    assert await world.until_ended(120) == {"done": 2}
    assert await vectors(world) == first, "bit for bit"
    cost = await costs(world, document)
    assert (cost["cached"], cost["tokens"], cost["requests"]) == (len(texts), 0, 0)

    # most of the same text in another document of the same user
    longer = long_document(world.home / "files" / "b.md", sections=14)
    await world.ingest([(longer, mine)])
    assert await world.until_ended(120) == {"done": 3}
    assert simulator.books.paid_again() == dict.fromkeys(texts, 1)
    longer_texts = await live_texts(world, mine)
    assert set(simulator.books.paid) == set(longer_texts)
    assert len(longer_texts) > len(texts)

    # other chunks: those that are new are paid for, and no others
    known, requests = set(simulator.books.paid), simulator.books.requests
    world.kill_all()
    world.environment["UPLOAD_PIPELINE_CHUNK_TARGET_CHARS"] = "1200"
    jobs = f"select job_id from upload_pipeline.upload_jobs where user_id = '{mine}'"
    await rows(world, f"select r.state::text from ({jobs}) j, upload_pipeline.retry_job(j.job_id, 'chunking') r")
    world.start_worker()
    assert await world.until_ended(120) == {"done": 3}
    cut = set(await live_texts(world, mine))
    assert cut - known, "or nothing was cut anew"
    assert cut & known, "or nothing stayed"
    assert set(simulator.books.paid) - known == cut - known
    assert simulator.books.paid_again() == dict.fromkeys(texts, 1)
    assert simulator.books.requests > requests

    told = await run_command(world, "usage", "--user", str(mine), "--by", "user", "--json")
    (usage,) = [json.loads(line) for line in told.stdout.splitlines()]
    assert usage["cached"] >= 2 * len(texts)


async def test_a_killed_worker_costs_what_was_under_way_and_no_more(world: World, simulator: OpenAISimulator) -> None:
    """The chunks are cut anew after the kill, so that nothing but the cache can know what was paid for."""
    simulator.latency = 0.15
    world.environment["UPLOAD_PIPELINE_OPENAI_CONCURRENCY"] = "1"
    user = uuid4()
    (document,) = await world.ingest([(long_document(world.home / "files" / "a.md", sections=40), user)])
    victim = world.start_worker()
    async with asyncio.timeout(120):
        while simulator.books.answered < 4:
            await asyncio.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    await asyncio.to_thread(victim.wait)
    (kept,) = await rows(world, "select count(*) as n from upload_pipeline.embedding_cache")
    assert kept["n"] >= 3 * 6
    (left,) = await rows(world, f"select job_id from upload_pipeline.upload_jobs where document_id = '{document}'")
    await rows(world, f"select count(*) from upload_pipeline.retry_job('{left['job_id']}', 'chunking', true)")
    world.start_worker()
    assert await world.until_ended(120) == {"done": 1}
    again = simulator.books.paid_again()
    assert len(again) <= 6, "the request whose answer the killed process may have had in its hands"
    assert sum(again.values()) <= 6
    assert (await costs(world, document))["cached"] >= kept["n"]


async def test_an_answer_for_a_job_that_was_taken_away_is_there_for_whoever_leads_it_now(
    world: World, simulator: OpenAISimulator
) -> None:
    simulator.latency = 1.0
    user = uuid4()
    (document,) = await world.ingest([(long_document(world.home / "files" / "a.md", sections=5), user)])
    world.start_worker()
    async with asyncio.timeout(120):
        while not simulator._in_flight:
            await asyncio.sleep(0.01)
    (job,) = await rows(world, f"select job_id from upload_pipeline.upload_jobs where document_id = '{document}'")
    # parked until the answer is there: the old worker's batcher brings it under a token that is stale
    await rows(world, f"select count(*) from upload_pipeline.cancel_job('{job['job_id']}')")
    async with asyncio.timeout(120):
        while simulator._in_flight:
            await asyncio.sleep(0.01)
    assert await world.until_ended(120) == {"cancelled": 1}
    async with asyncio.timeout(60):
        while not (await rows(world, "select from upload_pipeline.embedding_cache")):
            await asyncio.sleep(0.01)
    await rows(world, f"select count(*) from upload_pipeline.retry_job('{job['job_id']}', 'chunking')")
    assert await world.until_ended(120) == {"done": 1}
    assert simulator.books.paid_again() == {}
    assert simulator.books.paid == await live_texts(world, user)
