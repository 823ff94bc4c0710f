from __future__ import annotations

import asyncio
import hashlib
import math
import random
import shutil
import subprocess
import sys
import threading
import typing
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.providers import local_embedder
from upload_pipeline.providers.embedding import EMBEDDERS, MAX_BATCH, Embedder, EmbeddingModel, open_embedder
from upload_pipeline.providers.local_embedder import LocalEmbedder
from upload_pipeline.settings import Settings

SENTENCE = (
    "deductible water damage policy roof hail claim adjuster limit exclusion premium mortgagee endorsement the of and "
    "a is for within days notice loss fire theft liability 500 $1,250.00 Straße naïve 保険 免責 😀 § (a) | --- |"
)
WORDS = SENTENCE.split()


def passages(count: int, seed: int = 7) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 300))) for _ in range(count)]


def digest(vectors: np.ndarray) -> str:
    return hashlib.sha256(vectors.tobytes()).hexdigest()


def run_python(code: str, *, prefix: tuple[str, ...] = ()) -> str:
    """Runs code in a fresh interpreter where every warning is an error; gives what it printed."""
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture
async def embedder() -> AsyncIterator[LocalEmbedder]:
    opened = LocalEmbedder()
    yield opened
    await opened.close()


def assert_unit_rows(vectors: np.ndarray, count: int) -> None:
    assert vectors.shape == (count, 256)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1.0, atol=1e-6)


# opening


def test_the_local_embedder_is_opened_by_name_and_states_its_facts() -> None:
    embedder: Embedder = open_embedder("local", Settings())
    assert embedder.facts == EmbeddingModel(name="wordllama-256", provider="local", dimensions=256)
    assert (embedder.model, embedder.dimensions) == ("wordllama-256", 256)


@pytest.mark.parametrize("name", ["", "OpenAI", "LOCAL", "local "])
def test_an_unknown_name_is_refused_with_the_names_that_are_allowed(name: str) -> None:
    with pytest.raises(PipelineError) as caught:
        open_embedder(name, Settings())
    assert caught.value.code is ErrorCode.SETTING_INVALID
    assert repr(name) in caught.value.message
    assert caught.value.details["allowed"] == ["local", "openai"]


def test_the_setting_allows_exactly_the_embedders_there_are() -> None:
    assert typing.get_args(Settings.model_fields["embedder"].annotation) == EMBEDDERS


def test_importing_the_module_loads_neither_numpy_nor_the_tokenizer() -> None:
    printed = run_python(
        "import sys\n"
        "from upload_pipeline.providers import embedding, local_embedder\n"
        "from upload_pipeline.settings import Settings\n"
        "embedding.open_embedder('local', Settings())\n"
        "print(sorted({'numpy', 'tokenizers', 'safetensors', 'wordllama', 'requests', 'openai'} & set(sys.modules)))"
    )
    assert printed == "[]"


# what comes back


async def test_rows_have_length_one_and_stand_in_the_order_of_the_texts(embedder: LocalEmbedder) -> None:
    texts = passages(5)
    vectors = await embedder.embed(texts)
    assert_unit_rows(vectors, 5)
    for row, text in zip(vectors, texts, strict=True):
        assert (row == (await embedder.embed([text]))[0]).all()


async def test_no_texts_give_an_array_without_rows(embedder: LocalEmbedder) -> None:
    vectors = await embedder.embed([])
    assert vectors.shape == (0, 256)
    assert vectors.dtype == np.float32


async def test_a_question_is_nearest_to_the_passage_that_answers_it(embedder: LocalEmbedder) -> None:
    texts = [
        "The deductible for water damage from a burst pipe is $2,500 for each loss.",
        "We do not insure loss of or damage to aircraft, including hobby drones.",
        "Notice of a claim must reach us within sixty days, in writing.",
        "Jewellery and watches are covered against theft up to $1,500.",
    ]
    vectors = await embedder.embed(texts)
    questions = ["what is the deductible for water damage", "are drones insured", "how soon must I report a claim"]
    nearest = (await embedder.embed(questions)) @ vectors.T
    assert nearest.argmax(axis=1).tolist() == [0, 1, 2]


def test_vectors_agree_with_the_pooling_of_wordllama_itself() -> None:
    # In a process of its own, because importing wordllama sets up the root logger.
    run_python(
        "import asyncio, pathlib, socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('no network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "import numpy as np, wordllama\n"
        "from upload_pipeline.providers.local_embedder import LocalEmbedder\n"
        f"texts = {passages(40)!r}\n"
        "theirs = wordllama.WordLlama.load(\n"
        "    cache_dir=pathlib.Path(wordllama.__file__).parent, disable_download=True\n"
        ").embed(texts, norm=True)\n"
        "ours = asyncio.run(LocalEmbedder().embed(texts))\n"
        "np.testing.assert_allclose(ours, theirs, atol=1e-6)\n"
    )


async def test_the_model_name_stands_for_these_very_vectors(embedder: LocalEmbedder) -> None:
    # Stored vectors are compared with new ones by name: when this digest must change, so must the name.
    vectors = await embedder.embed(["What is the deductible for water damage?", "Straße, 保険, 😀", ""])
    assert digest(vectors) == "9fe12ea0f8df505dae9a01ff784bcbc454417e91c6be21a234dc0f9eebc4cb80"


# the same text gives the same vector


async def test_order_and_company_in_a_batch_do_not_show_in_a_vector(embedder: LocalEmbedder) -> None:
    texts = passages(MAX_BATCH + 60)
    expected = await embedder.embed(texts)
    order = list(range(len(texts)))
    random.Random(3).shuffle(order)
    shuffled = await embedder.embed([texts[position] for position in order])
    assert (shuffled == expected[order]).all()
    beside_a_long_one = await embedder.embed(["word " * 40_000, *texts[:10]])
    assert (beside_a_long_one[1:] == expected[:10]).all()


def test_two_processes_agree_to_the_last_bit() -> None:
    code = (
        "import asyncio, hashlib\n"
        "from upload_pipeline.providers.local_embedder import LocalEmbedder\n"
        f"texts = {passages(50)!r}\n"
        "texts = {order}\n"
        "vectors = asyncio.run(LocalEmbedder().embed(texts))\n"
        "print(*sorted(hashlib.sha256(row.tobytes()).hexdigest() for row in vectors))"
    )
    straight = run_python(code.format(order="texts"))
    backwards = run_python(code.format(order="texts[::-1]"), prefix=("env", "OPENBLAS_NUM_THREADS=1"))
    assert straight == backwards
    assert len(straight.split()) == 50


async def test_calls_that_run_at_once_get_the_vectors_of_calls_one_by_one(embedder: LocalEmbedder) -> None:
    lists = [passages(20, seed) for seed in range(8)]
    together = await asyncio.gather(*(embedder.embed(texts) for texts in lists))
    for texts, vectors in zip(lists, together, strict=True):
        assert (vectors == await embedder.embed(texts)).all()


def test_the_sum_of_the_tokens_is_exact_so_that_no_order_of_adding_can_show() -> None:
    model = local_embedder._load()
    text = " ".join(passages(40))
    tokens = model.tokenizer.encode(text, add_special_tokens=False).ids
    assert len(tokens) > 5000
    exact = [math.fsum(column) for column in model.table[tokens].T.tolist()]
    assert local_embedder._token_sum(model, text).tolist() == exact


# texts that are hard


@pytest.mark.parametrize("text", ["", " ", "\n", "\t \r\n", " " * 9000, "\u00a0\u2003\u3000"])
async def test_a_text_that_says_nothing_has_the_vector_of_a_space(embedder: LocalEmbedder, text: str) -> None:
    vectors = await embedder.embed([text, " "])
    assert_unit_rows(vectors, 2)
    assert (vectors[0] == vectors[1]).all()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Claim 7 " * 1000, id="8,000 bytes"),
        pytest.param("hail damage to the north slope, " * 32_768, id="1 MB of prose"),
        pytest.param("x" * 1_048_576, id="1 MB without a space"),
        pytest.param("\x00", id="NUL alone"),
        pytest.param("before\x00after", id="NUL inside"),
        pytest.param("\ud800", id="lone surrogate"),
        pytest.param("price \udc80 is \ud83d", id="lone surrogates inside"),
        pytest.param("\U000e0001\ue000\ufffe", id="characters in no vocabulary"),
        pytest.param("<unk><unk><s></s>", id="the tokenizer's own special tokens"),
        pytest.param("\u200b\u200d\u2060", id="invisible characters"),
        pytest.param("\x01\x02\x1b[31m", id="control characters"),
    ],
)
async def test_any_text_gets_a_finite_vector_of_length_one(embedder: LocalEmbedder, text: str) -> None:
    assert_unit_rows(await embedder.embed([text]), 1)


async def test_a_lone_surrogate_counts_as_the_replacement_character(embedder: LocalEmbedder) -> None:
    vectors = await embedder.embed(["price \ud800 paid", "price \ufffd paid", "price paid"])
    assert (vectors[0] == vectors[1]).all()
    assert (vectors[0] != vectors[2]).any()


async def test_a_pair_of_surrogates_counts_as_the_character_it_means(embedder: LocalEmbedder) -> None:
    vectors = await embedder.embed(["\ud83d\ude00", "\U0001f600"])
    assert (vectors[0] == vectors[1]).all()


async def test_all_of_a_long_text_counts_not_just_its_beginning(embedder: LocalEmbedder) -> None:
    beginning = "wind and hail. " * 20_000
    vectors = await embedder.embed([beginning, beginning + "flood water in the cellar. " * 20_000])
    assert float(vectors[0] @ vectors[1]) < 0.95


def test_tokens_whose_sum_is_zero_have_the_vector_of_a_space() -> None:
    model = local_embedder._load()
    silent = model.tokenizer.encode("a", add_special_tokens=False).ids
    table = model.table.copy()
    table[silent] = 0.0
    crafted = local_embedder._Model(model.tokenizer, table)
    assert not local_embedder._token_sum(crafted, "a").any()
    assert (local_embedder._embed_text(crafted, "a") == local_embedder._embed_text(crafted, " ")).all()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(st.characters()), min_size=1, max_size=6))
def test_any_mix_of_texts_gives_finite_rows_that_do_not_depend_on_each_other(texts: list[str]) -> None:
    model = local_embedder._load()
    vectors = local_embedder._embed_batch(model, texts)
    assert_unit_rows(vectors, len(texts))
    assert (vectors[-1] == local_embedder._embed_text(model, texts[-1])).all()


async def test_one_string_is_refused_instead_of_being_taken_letter_by_letter(embedder: LocalEmbedder) -> None:
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        await embedder.embed("deductible")


@pytest.mark.parametrize("item", [None, b"bytes", 7])
async def test_an_item_that_is_not_a_string_is_named(embedder: LocalEmbedder, item: object) -> None:
    with pytest.raises(TypeError, match=f"item 1 is {type(item).__name__}"):
        await embedder.embed(["fine", item])  # type: ignore[list-item]


# threads, loading, closing


async def test_the_event_loop_goes_on_while_texts_are_embedded(embedder: LocalEmbedder) -> None:
    await embedder.embed(["load"])
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticker = asyncio.create_task(tick())
    batches = 3
    await embedder.embed(passages(MAX_BATCH) * batches)
    ticker.cancel()
    # Work on the loop itself would let it turn only between the batches.
    assert ticks > batches * 5


async def test_work_is_done_in_batches_of_at_most_256(embedder: LocalEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    threads: set[str] = set()
    original = local_embedder._embed_batch

    def record(model: local_embedder._Model, texts: list[str], *rest: int) -> np.ndarray:
        sizes.append(len(texts))
        threads.add(threading.current_thread().name)
        return original(model, texts, *rest)

    monkeypatch.setattr(local_embedder, "_embed_batch", record)
    assert (await embedder.embed(["text"] * 600)).shape == (600, 256)
    assert sizes == [256, 256, 88]
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


def test_first_calls_from_many_threads_load_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_embedder, "_loaded", None)
    reads: list[Path] = []
    original = local_embedder._read_model
    start = threading.Barrier(8)

    def count(folder: Path) -> local_embedder._Model:
        reads.append(folder)
        return original(folder)

    def first_call() -> int:
        start.wait(timeout=30)
        return id(local_embedder._load())

    monkeypatch.setattr(local_embedder, "_read_model", count)
    with ThreadPoolExecutor(8) as threads:
        models = {future.result() for future in [threads.submit(first_call) for _ in range(8)]}
    assert len(reads) == 1
    assert len(models) == 1


def test_a_load_that_failed_is_tried_again_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_embedder, "_loaded", None)
    with monkeypatch.context() as broken:
        broken.setattr(local_embedder, "_package_folder", lambda: Path("/nonexistent"))
        with pytest.raises(PipelineError):
            local_embedder._load()
    assert local_embedder._load().table.shape == (32000, 256)


async def test_a_cancelled_call_stops_at_the_next_batch(
    embedder: LocalEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    batches: list[int] = []
    original = local_embedder._embed_batch

    def hold(model: local_embedder._Model, texts: list[str], *rest: int) -> np.ndarray:
        batches.append(len(texts))
        begun.set()
        assert go_on.wait(timeout=30)
        return original(model, texts, *rest)

    with monkeypatch.context() as held:
        held.setattr(local_embedder, "_embed_batch", hold)
        call = asyncio.create_task(embedder.embed(["text"] * 1000))
        await asyncio.to_thread(begun.wait, 30)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        go_on.set()
        assert_unit_rows(await embedder.embed(["the next call"]), 1)
    assert batches == [256, 1]


async def test_a_closed_embedder_says_so_and_closing_twice_is_fine() -> None:
    embedder = LocalEmbedder()
    await embedder.embed(["text"])
    await embedder.close()
    await embedder.close()
    with pytest.raises(PipelineError, match="closed") as caught:
        await embedder.embed(["text"])
    assert caught.value.code is ErrorCode.EMBED_FAILED


async def test_closing_ends_a_running_call_with_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = LocalEmbedder()
    begun, go_on = threading.Event(), threading.Event()
    original = local_embedder._embed_batch

    def hold(model: local_embedder._Model, texts: list[str], *rest: int) -> np.ndarray:
        begun.set()
        assert go_on.wait(timeout=30)
        return original(model, texts, *rest)

    monkeypatch.setattr(local_embedder, "_embed_batch", hold)
    call = asyncio.create_task(embedder.embed(["text"] * 1000))
    await asyncio.to_thread(begun.wait, 30)
    closing = asyncio.create_task(embedder.close())
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(PipelineError, match="closed while it worked"):
        await call
    await closing


# the model's files


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    source = local_embedder._package_folder()
    for name in (local_embedder._TOKENIZER_FILE, local_embedder._WEIGHTS_FILE):
        (tmp_path / name).parent.mkdir()
        shutil.copyfile(source / name, tmp_path / name)
    local_embedder._read_model(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [local_embedder._TOKENIZER_FILE, local_embedder._WEIGHTS_FILE])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "something else"])
def test_a_damaged_model_file_is_named_with_the_remedy(model_folder: Path, name: Path, damage: str) -> None:
    path = model_folder / name
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut off": whole[: len(whole) // 2], "something else": b"{}" * 500}[damage])
    with pytest.raises(PipelineError) as caught:
        local_embedder._read_model(model_folder)
    assert caught.value.code is ErrorCode.EMBED_FAILED
    assert str(path) in caught.value.message
    assert "Reinstall" in caught.value.message


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(np.zeros((32000, 128), np.float16), id="other dimensions"),
        pytest.param(np.zeros((100, 256), np.float16), id="other vocabulary"),
        pytest.param(np.zeros((32000, 256), np.float32), id="other type"),
        pytest.param(np.full((32000, 256), np.nan, np.float16), id="not finite"),
    ],
)
def test_weights_of_another_model_are_refused(model_folder: Path, weights: np.ndarray) -> None:
    from safetensors.numpy import save_file

    save_file({"embedding.weight": weights}, model_folder / local_embedder._WEIGHTS_FILE)
    with pytest.raises(PipelineError, match="float16 \\(32000, 256\\) was expected") as caught:
        local_embedder._read_model(model_folder)
    assert caught.value.code is ErrorCode.EMBED_FAILED


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_embedder, "_PACKAGE", "no_such_package_here")
    with pytest.raises(PipelineError, match=r"no_such_package_here.*not installed"):
        local_embedder._package_folder()


# what it leaves alone

EMBED_ONCE = (
    "import asyncio, os, logging, sys\n"
    "from upload_pipeline.providers.local_embedder import LocalEmbedder\n"
    "print(asyncio.run(LocalEmbedder().embed(['hail'])).shape)\n"
)


def test_it_works_without_a_network() -> None:
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a network namespace here")
    assert run_python(EMBED_ONCE, prefix=(unshare, "-n")) == "(1, 256)"


def test_it_never_opens_a_socket_to_anywhere() -> None:
    watch = (
        "import sys\n"
        "def forbid(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto'): raise SystemExit(event)\n"
        "sys.addaudithook(forbid)\n"
    )
    assert run_python(watch + EMBED_ONCE) == "(1, 256)"


def test_logging_is_left_as_it_was_and_a_fork_afterwards_warns_of_nothing() -> None:
    printed = run_python(
        EMBED_ONCE + "assert logging.getLogger().handlers == [], logging.getLogger().handlers\n"
        "assert not {'wordllama', 'requests'} & set(sys.modules)\n"
        "import subprocess; subprocess.run([sys.executable, '-c', ''], check=True, preexec_fn=lambda: None)\n"
    )
    assert printed == "(1, 256)"


@pytest.mark.parametrize(("given_value", "seen"), [("", "false"), ("TOKENIZERS_PARALLELISM=true", "true")])
def test_the_operators_choice_of_tokenizer_threads_stands(given_value: str, seen: str) -> None:
    prefix = ("env", "-u", "TOKENIZERS_PARALLELISM", *([given_value] if given_value else []))
    printed = run_python(EMBED_ONCE + "print(os.environ['TOKENIZERS_PARALLELISM'])", prefix=prefix)
    assert printed.splitlines()[-1] == seen
