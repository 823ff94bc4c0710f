from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import liteparse
import mammoth
import pytest
from markdownify import markdownify
from sample_documents import KINDS, Block, Heading, Kind, Paragraph, Table, make_document, phrase, write_docx, write_pdf

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
WRITTEN = {"homeowners-policy.pdf", "homeowners-policy.docx"}
BY_HAND = {"inspection-note.txt", "claims-handbook.md", "claims-faq.html"}


def pdf_pages(data: bytes) -> list[str]:
    parser = liteparse.LiteParse(output_format="markdown", ocr_enabled=False, quiet=True)
    return [page.markdown for page in parser.parse(data).pages]


def docx_html(data: bytes) -> str:
    result = mammoth.convert_to_html(io.BytesIO(data))
    assert result.messages == []
    return str(result.value)


def as_text(kind: Kind, data: bytes) -> str:
    """What the parser library of a kind reads."""
    match kind:
        case "pdf":
            return "\n".join(pdf_pages(data))
        case "docx":
            return markdownify(docx_html(data), heading_style="ATX")
        case "html":
            return markdownify(data.decode(), heading_style="ATX")
        case _:
            return data.decode()


# documents for tests


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_opens_and_holds_its_phrase_once(kind: Kind) -> None:
    for seed in (0, 1, 12, 345, 999_999):
        text = as_text(kind, make_document(kind, seed))
        assert text.count(phrase(seed)) == 1
        assert phrase(seed + 1) not in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_content(kind: Kind) -> None:
    first = make_document(kind, 5, pages=3)
    assert make_document(kind, 5, pages=3) == first
    assert make_document(kind, 5, pages=4) != first
    paragraphs = [set(as_text(kind, make_document(kind, seed, pages=3)).split("\n\n")) for seed in (5, 6)]
    assert len(paragraphs[0] & paragraphs[1]) < len(paragraphs[0]) / 4


def test_bytes_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import sys, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "from sample_documents import KINDS, make_document\n"
        "print(hashlib.sha256(b''.join(make_document(kind, 42, 3) for kind in KINDS)).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT / "tests")],
            env={"PYTHONHASHSEED": seed, "TZ": zone},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
    }
    assert len(digests) == 1


def test_phrases_differ_from_seed_to_seed() -> None:
    phrases = [phrase(seed) for seed in (*range(3000), 10**6, 10**9)]
    assert len(set(phrases)) == len(phrases)
    assert not any(phrases[7] in other for other in phrases[8:])


@pytest.mark.parametrize("pages", [1, 2, 30])
def test_a_pdf_has_the_pages_asked_for_and_its_phrase_on_the_last(pages: int) -> None:
    for seed in range(6):
        found = pdf_pages(make_document("pdf", seed, pages))
        assert len(found) == pages
        assert [phrase(seed) in page for page in found] == [False] * (pages - 1) + [True]
        for number, page in enumerate(found, 1):
            assert re.search(rf"^## .+, part {number}$", page, re.MULTILINE)


@pytest.mark.parametrize("kind", ["pdf", "docx", "md", "html"])
def test_headings_tables_and_lists_come_out_as_such(kind: Kind) -> None:
    for seed in range(4):
        text = as_text(kind, make_document(kind, seed))
        assert re.search(rf"^# Claim file {seed:06d}$", text, re.MULTILINE)
        assert len(re.findall(r"^## .+, part [12]$", text, re.MULTILINE)) == 2
        assert len(re.findall(r"^\| [A-Z][a-z ]+ \| \$[\d,]+ \|$", text, re.MULTILINE)) == 6
        assert len(re.findall(r"^(?:[-*+]|\d\.) [A-Z]", text, re.MULTILINE)) == 6


def test_each_numbered_list_of_a_docx_starts_at_one() -> None:
    numbering = zipfile.ZipFile(io.BytesIO(make_document("docx", 0, pages=20))).read("word/numbering.xml").decode()
    document = zipfile.ZipFile(io.BytesIO(make_document("docx", 0, pages=20))).read("word/document.xml").decode()
    used = set(re.findall(r'<w:numId w:val="(\d+)"', document))
    assert len(used) > 2
    assert used <= set(re.findall(r'<w:num w:numId="(\d+)"', numbering))


def test_characters_that_the_formats_treat_as_special_come_through() -> None:
    text = "Fees (net) & costs: 5 < 6 > 4, café §7 €20"
    rows = (("A & B", "C"), ("(1)", "<2>"))
    blocks: list[Block] = [Heading(1, "Title (a) & b"), Paragraph(text), Table(rows)]
    page = "\n".join(pdf_pages(write_pdf(blocks, footer="foot (b) {page}/{pages}")))
    for expected in ("# Title (a) & b", text, "| A & B | C |", "| (1) | <2> |", "foot (b) 1/1"):
        assert expected in page
    html = docx_html(write_docx(blocks))
    assert "Fees (net) &amp; costs: 5 &lt; 6 &gt; 4, café §7 €20" in html
    assert "<td><p>&lt;2&gt;</p></td>" in html


def test_a_character_that_the_pdf_font_lacks_is_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        write_pdf([Paragraph("保険")])


@pytest.mark.parametrize(("seed", "pages"), [(-1, 1), (0, 0), (0, -3)])
def test_a_negative_seed_and_no_pages_are_refused(seed: int, pages: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        make_document("txt", seed, pages)


# the samples of the project


def source_headings() -> list[str]:
    source = (SAMPLES / "sources" / "homeowners-policy.md").read_text(encoding="utf-8")
    return re.findall(r"^#+ .+$", source, re.MULTILINE)


def test_the_committed_samples_are_there_small_and_match_their_source() -> None:
    assert {path.name for path in SAMPLES.iterdir() if path.is_file()} == WRITTEN | BY_HAND
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 300_000
    subprocess.run([sys.executable, ROOT / "scripts" / "make-samples", "--check"], check=True, timeout=60)


def test_the_policy_as_pdf_has_the_headings_tables_and_pages_of_its_source() -> None:
    pages = pdf_pages((SAMPLES / "homeowners-policy.pdf").read_bytes())
    assert 3 <= len(pages) <= 5
    text = "\n".join(pages)
    assert re.findall(r"^#+ .+$", text, re.MULTILINE) == source_headings()
    assert "| Water damage | $2,500 |" in pages[0]
    assert "| A Dwelling | House and attached structures | $412,000 |" in pages[0]
    assert "solar panels" in pages[-1]
    assert "page 1 of" not in text


def test_the_policy_as_docx_has_the_headings_and_tables_of_its_source() -> None:
    text = markdownify(docx_html((SAMPLES / "homeowners-policy.docx").read_bytes()), heading_style="ATX")
    assert re.findall(r"^#+ .+$", text, re.MULTILINE) == source_headings()
    assert "| Water damage | $2,500 |" in text
    assert "| F Medical payments | Each person | $5,000 |" in text


def test_the_script_finds_a_changed_source_and_writes_it_anew(tmp_path: Path) -> None:
    for name in ("scripts/make-samples", "tests/sample_documents.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(SAMPLES, tmp_path / "samples")
    source = tmp_path / "samples" / "sources" / "homeowners-policy.md"
    source.write_text(source.read_text(encoding="utf-8").replace("$2,500", "$2,750"), encoding="utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [sys.executable, tmp_path / "scripts" / "make-samples", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    stale = run("--check")
    assert stale.returncode == 1
    assert "homeowners-policy.pdf does not match" in stale.stderr
    assert run().stdout.count("wrote") == 2
    assert "$2,750" in pdf_pages((tmp_path / "samples" / "homeowners-policy.pdf").read_bytes())[0]
    assert run("--check").returncode == 0
    assert run().stdout == ""


def test_the_script_names_a_block_that_it_cannot_print(tmp_path: Path) -> None:
    for name in ("scripts/make-samples", "tests/sample_documents.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "samples" / "sources").mkdir(parents=True)
    (tmp_path / "samples" / "sources" / "homeowners-policy.md").write_text("# Title\n\n#### Too deep\n")
    command: list[str | Path] = [sys.executable, tmp_path / "scripts" / "make-samples"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "#### Too deep" in done.stderr
    assert not list((tmp_path / "samples").glob("*.pdf"))
