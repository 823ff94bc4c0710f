"""Metadata mappings: what is kept, what fails one file, what fails all."""

from __future__ import annotations

import csv
import io
import json
import string
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from upload_pipeline.errors import ErrorCode, PipelineError
from upload_pipeline.intake.filenames import display_name
from upload_pipeline.intake.mapping import MAX_WARNINGS, MappedMetadata, read_mapping
from upload_pipeline.intake.mapping_rows import MAX_ROWS

LIMIT = 10 * 1024 * 1024
HEADER = "filename,author,department,date_created,tags,category\n"


def mapped(data: str | bytes, *filenames: str, required: tuple[str, ...] = ()) -> MappedMetadata:
    encoded = data.encode() if isinstance(data, str) else data
    return read_mapping(encoded, filenames=filenames or ("a.pdf",), max_bytes=LIMIT, required=required)


def of(data: str | bytes, filename: str = "a.pdf", **more: Any) -> dict[str, Any]:
    found = mapped(data, filename, **more).by_filename[filename]
    assert not isinstance(found, PipelineError), found
    return found


def fault(data: str | bytes, filename: str = "a.pdf", **more: Any) -> PipelineError:
    found = mapped(data, filename, **more).by_filename[filename]
    assert isinstance(found, PipelineError), found
    assert found.code is ErrorCode.INVALID_METADATA
    return found


def unreadable(data: str | bytes) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        mapped(data)
    assert caught.value.code is ErrorCode.INVALID_MAPPING
    return caught.value


WHOLE = {
    "author": "Ines Varga",
    "department": "Claims, West",
    "date_created": "2026-01-31",
    "tags": ["roof", "storm"],
    "category": 'a "quoted" one',
    "reference": "007",
}
ROW = 'a.pdf, Ines Varga ,"Claims, West",2026-01-31," roof,storm ,,roof","a ""quoted"" one",007'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_row_of_csv_is_kept_with_its_types(end: str, mark: bytes) -> None:
    text = f"filename,author,department,date_created,tags,category,reference{end}{ROW}{end}{end}"
    found = mapped(mark + text.encode())
    assert found.by_filename == {"a.pdf": WHOLE}
    assert found.warnings == ()


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_an_object_of_json_is_kept_with_its_types(mark: bytes) -> None:
    assert of(mark + json.dumps({"a.pdf": WHOLE}, indent=2).encode()) == WHOLE
    spelled = {"filename": "a.pdf", "Tags": "roof, storm", "author": None, "category": "", "n": 12.50, "yes": True}
    assert of('{"a.pdf": ' + json.dumps(spelled)[:-1] + ', "exact": 12345678901234567890.10}}') == {
        "tags": ["roof", "storm"],
        "n": "12.5",
        "yes": "true",
        "exact": "12345678901234567890.10",
    }


def test_columns_may_be_few_in_any_order_and_in_a_spreadsheets_spelling() -> None:
    assert of("Department, FILENAME ,Case No,,\nClaims,a.pdf,17,,\n") == {"department": "Claims", "Case No": "17"}
    assert of("filename\na.pdf\n") == {}
    assert of("filename,author\na.pdf\n") == {}
    assert of('filename,author\na.pdf,"two\nlines"\n') == {"author": "two\nlines"}
    assert of("{}") == {}
    long = {"a.pdf": {"author": "x" * 5000}, "b.pdf": 7}
    assert of(json.dumps(long)) == long["a.pdf"]
    assert fault('{"a.pdf": ' + "7" * 5000 + "}").details["field"] == "filename"


def test_names_meet_whatever_stands_before_or_around_them() -> None:
    names = {"a.pdf": "sub/a.pdf", "b.pdf": "C:\\x\\b.pdf", "caf\u00e9.pdf": "cafe\u0301.pdf", "d e.pdf": " d e.pdf "}
    rows = "".join(f'"{spelled}",{n}\n' for n, spelled in enumerate(names.values()))
    found = mapped("filename,n\n" + rows, *names)
    assert {name: found.by_filename[name] for name in names} == {name: {"n": str(n)} for n, name in enumerate(names)}


def test_a_file_without_a_row_has_no_metadata_and_a_row_without_a_file_is_a_warning() -> None:
    found = mapped(HEADER + "b.pdf,B\n,nobody\nc.pdf,C\n", "a.pdf", "c.pdf")
    assert found.by_filename == {"a.pdf": {}, "c.pdf": {"author": "C"}}
    assert found.warnings == (
        "line 2 of the mapping: there is no file 'b.pdf' in the batch",
        "line 3 of the mapping has no filename",
    )
    many = mapped(HEADER + "".join(f"{n}.pdf\n" for n in range(MAX_WARNINGS + 7)))
    assert len(many.warnings) == MAX_WARNINGS + 1
    assert many.warnings[-1] == "7 more rows of the mapping have no file in the batch"
    assert mapped('{"b.pdf": 3}').warnings == ("line 1 of the mapping: there is no file 'b.pdf' in the batch",)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ("a.pdf,,,31.01.2026", "date_created"),
        ("a.pdf,,,2026-02-30", "date_created"),
        ("a.pdf,,,20260131", "date_created"),
        ("a.pdf,,,2026-01-31T00:00", "date_created"),
        ("a.pdf,,,,roof,storm,extra", "category"),
        ("a.pdf," + "x" * 20_000, None),
        ("a.pdf,1\n\nA.pdf,2\na.pdf,3", "filename"),
    ],
)
def test_a_row_that_does_not_validate_fails_its_own_file(row: str, field: str | None) -> None:
    text = HEADER + row + "\nb.pdf,Yuki Brandt\n"
    error = fault(text)
    assert error.details.get("field") == field
    assert (field or "author") in error.message
    assert of(text, "b.pdf") == {"author": "Yuki Brandt"}


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ('{"author": 5}', "author"),
        ('{"category": true}', "category"),
        ('{"department": ["x"]}', "department"),
        ('{"date_created": 20260131}', "date_created"),
        ('{"tags": 5}', "tags"),
        ('{"tags": {}}', "tags"),
        ('{"tags": ["x", 5]}', "tags"),
        ('{"tags": [["x"]]}', "tags"),
        ('{"further": {"x": 1}}', "further"),
        ('{"further": ["x"]}', "further"),
        ('{"author": "x", "Author": "y"}', "author"),
        ('{"filename": "b.pdf"}', "filename"),
        ('"text"', "filename"),
        ("null", "filename"),
        ("[1]", "filename"),
        ('{"": "x"}', ""),
        ('{"author": "a\\u0000b"}', None),
        ('{"author": "\\ud800"}', None),
    ],
)
def test_an_entry_of_the_wrong_types_fails_its_own_file(entry: str, field: str | None) -> None:
    text = '{\n"b.pdf": {"author": "Yuki Brandt"},\n"a.pdf": ' + entry + "}"
    error = fault(text)
    assert error.details.get("field") == field
    if field:
        assert field in error.message
        assert "ine 3 " in error.message
    assert of(text, "b.pdf") == {"author": "Yuki Brandt"}


def test_a_name_twice_in_json_fails_its_file() -> None:
    error = fault('{"a.pdf": {},\n"x/a.pdf": {}}')
    assert error.details["field"] == "filename"
    assert "lines 1 and 2" in error.message


@pytest.mark.parametrize(
    ("data", "line", "column", "said"),
    [
        ("", 1, 1, "empty"),
        (b"\xef\xbb\xbf \r\n", 1, 1, "empty"),
        ("author,department\nx,y\n", 1, 1, "no column 'filename'"),
        ("filename;author\na.pdf;x\n", 1, 1, "commas"),
        ("a.pdf,x,y\n", 1, 1, "no column 'filename'"),
        ("\nfilename,author,Author\n", 2, 3, "twice"),
        ("filename,,author\n", 1, 2, "0 characters"),
        (f"filename,{'x' * 101}\n", 1, 2, "101 characters"),
        (HEADER + 'a.pdf,"open\nb.pdf,x\n', 2, 1, "no closing quote"),
        (HEADER + 'a.pdf,"x"y\n', 2, 1, "quotes"),
        (HEADER + "a.pdf," + "x" * 140_000, 2, 1, "longer than"),
        (HEADER.encode() + b"a.pdf,caf\xe9\n", 2, 10, "UTF-8"),
        (HEADER.encode("utf-16"), 1, 1, "UTF-8"),
        (HEADER.encode("utf-16-le"), 1, 2, "UTF-8"),
        (HEADER + "a.pdf,x\0y\n", 2, 8, "NUL"),
        ('["a.pdf"]', 1, 1, "object"),
        ('{"a.pdf": {}', 1, 13, "closing brace"),
        ('{"a.pdf"', 1, 9, "colon"),
        ('{"a.pdf": {},}', 1, 14, "filename in double quotes"),
        ("{'a.pdf': {}}", 1, 2, "filename in double quotes"),
        ('{\n"a.pdf": {"author": x}}', 2, 21, "JSON"),
        ('{"a.pdf": {"n": NaN}}', 1, 11, "NaN"),
        ('{"a.pdf": {}} {}', 1, 15, "behind"),
        ('{"a.pdf": ' + "[" * 100_000, 1, 11, "nested"),
        ('{"a.pdf": "' + "x" * 200_000 + '"}', 1, 11, "longer than 131,072"),
        ('{"a.pdf": ' + "1" * 200_000 + "}", 1, 11, "longer than 131,072"),
    ],
)
def test_what_cannot_be_read_as_a_whole_says_where(data: str | bytes, line: int, column: int, said: str) -> None:
    error = unreadable(data)
    assert (error.details["line"], error.details["column"]) == (line, column)
    assert said in error.message
    assert f"line {line}, column {column}" in error.message


def test_required_fields_are_required_of_every_file() -> None:
    text = HEADER + "a.pdf,Ines,Claims\nb.pdf,Ines\n"
    assert of(text, required=("department", "author")) == {"author": "Ines", "department": "Claims"}
    assert fault(text, "b.pdf", required=("department",)).details == {"field": "department", "missing": ["department"]}
    assert "no row of 'c.pdf'" in fault(text, "c.pdf", required=("department",)).message
    bare = read_mapping(None, filenames=["a.pdf"], max_bytes=LIMIT, required=("author",))
    assert isinstance(bare.by_filename["a.pdf"], PipelineError)
    assert read_mapping(None, filenames=["a.pdf"], max_bytes=LIMIT) == MappedMetadata({"a.pdf": {}})


def test_a_mapping_beyond_the_limits_is_refused() -> None:
    with pytest.raises(PipelineError, match="limit of 10 bytes") as caught:
        read_mapping(b"x" * 11, filenames=["a.pdf"], max_bytes=10)
    assert caught.value.code is ErrorCode.INVALID_MAPPING
    assert f"{MAX_ROWS:,} rows" in unreadable("filename\n" + "b\n" * (MAX_ROWS + 1)).message


@pytest.mark.parametrize("kind", ["csv", "json", "hollow json"])
def test_ten_megabytes_are_read_in_little_memory(kind: str) -> None:
    row = ",".join(["x" * 60] * 3)
    made = {
        "csv": HEADER + "".join(f"{n}.pdf,{row}\n" for n in range(53_000)),
        "json": json.dumps({f"{n}.pdf": {"author": "x" * 170} for n in range(50_000)}),
        "hollow json": '{"b.pdf": [' + "[]," * 3_400_000 + "[]]}",
    }[kind].encode()
    assert 0.9 * LIMIT < len(made) <= LIMIT
    refused = False
    tracemalloc.start()
    try:
        read_mapping(made, filenames=["a.pdf"], max_bytes=LIMIT)
    except PipelineError as error:
        refused = error.code is ErrorCode.INVALID_MAPPING
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert refused == (kind == "hollow json")
    assert peak < 60 * 1024**2


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1, max_size=20).map(display_name)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30).map(str.strip)


@given(rows=st.dictionaries(NAMES, st.lists(TEXTS, min_size=3, max_size=3)), end=st.sampled_from(["\n", "\r\n"]))
def test_what_csv_writes_is_what_is_read(rows: dict[str, list[str]], end: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["filename", "author", "further", "category"], *([name, *row] for name, row in rows.items())])
    found = read_mapping(text.getvalue().encode(), filenames=rows, max_bytes=LIMIT)
    fields = ("author", "further", "category")
    assert found.by_filename == {
        name: {field: value for field, value in zip(fields, row, strict=True) if value} for name, row in rows.items()
    }
    assert found.warnings == ()


@given(rows=st.dictionaries(NAMES, st.fixed_dictionaries({}, optional={
    "author": TEXTS, "tags": st.lists(TEXTS, max_size=3, unique=True), "date_created": st.dates().map(str),
    "further": TEXTS | st.booleans() | st.integers(),
})))  # fmt: skip
def test_what_json_writes_is_what_is_read(rows: dict[str, dict[str, Any]]) -> None:
    found = read_mapping(json.dumps(rows).encode(), filenames=rows, max_bytes=LIMIT)

    def kept(field: str, value: Any) -> Any:
        if field == "tags":
            return [tag for tag in value if tag]
        return value if isinstance(value, str) else json.dumps(value)

    assert found.by_filename == {
        name: {field: whole for field, value in row.items() if (whole := kept(field, value))}
        for name, row in rows.items()
    }


PIECES = st.sampled_from(
    ['"', ",", "\n", "\r\n", "{", "}", "[", "]", ":", "filename", "a.pdf", "tags", "\\", "1e9", " "]
)


@example(" ")
@given(st.binary(max_size=300) | st.lists(PIECES | st.text(string.printable, max_size=5), max_size=40).map("".join))
def test_whatever_comes_is_read_or_refused_by_name(data: bytes | str) -> None:
    error = None
    try:
        found = mapped(data, "a.pdf", "b.pdf")
    except PipelineError as caught:
        error = caught
    if error is None:
        assert set(found.by_filename) == {"a.pdf", "b.pdf"}
    else:
        assert error.code is ErrorCode.INVALID_MAPPING
        assert "line" in error.details
