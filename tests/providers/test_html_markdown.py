from __future__ import annotations

import pytest

from upload_pipeline.providers.local.html_markdown import fragment_markdown, html_markdown


def markdown(html: str) -> str:
    return html_markdown(html.encode())


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<h1>A</h1><h3>B</h3><p>c <b>d</b> <em>e</em>", "# A\n\n### B\n\nc **d** *e*"),
        ("<p>one<p>two", "one\n\ntwo"),
        (
            "<ul><li>a<li>b<ul><li>c<ol><li>d</ol></ul><li>e</ul>",
            "- a\n- b\n  - c\n    1. d\n- e",
        ),
        ("<ol start=9><li>nine</li><li>ten<p>more</p></li></ol>", "9. nine\n10. ten\n\n    more"),
        ('<pre><code class="language-python">a\n\n  b\n</code></pre>', "```python\na\n\n  b\n```"),
        ('<div class="highlight-sql notranslate"><div><pre>x</pre></div></div>', "```sql\nx\n```"),
        ("<pre>a<br>b</pre>", "```\na\nb\n```"),
        ("<pre>```\nx\n```</pre>", "````\n```\nx\n```\n````"),
        ('<p>see <a href="https://e.org/a_b" title="x">this</a>', "see [this](https://e.org/a_b)"),
        ('<p>see <a href="#part">this</a> <a href="javascript:x()">that</a>', "see this that"),
        ('<a href="https://e.org"><h2>Linked</h2></a><p>x', "## Linked\n\nx"),
        ('<p>before <img src="x.png" alt="a chart"> after', "before a chart after"),
        (
            "<p># no heading<p>1. no list<p>- no list<p>snake_case",
            "\\# no heading\n\n1\\. no list\n\n\\- no list\n\nsnake_case",
        ),
        ("<p>a &lt;b&gt; &amp; c", "a <b> & c"),
        ("only words", "only words"),
        ("", ""),
        ("<body><p>x</body></html><p>after", "x\n\nafter"),
    ],
)
def test_structure_becomes_markdown(html: str, expected: str) -> None:
    assert markdown(html) == expected


@pytest.mark.parametrize(
    "noise",
    [
        "<script>noise()</script>",
        "<style>.noise{}</style>",
        "<noscript>noise</noscript>",
        "<nav><a href=/>noise</a></nav>",
        "<header>noise</header>",
        "<footer>noise</footer>",
        "<aside>noise</aside>",
        "<div role=navigation>noise</div>",
        "<div hidden>noise</div>",
        '<div aria-hidden="true">noise</div>',
        '<div style="color:red; display : NONE">noise</div>',
        "<span class='x sr-only'>noise</span>",
        "<form><label>noise<input value=noise></label><button>noise</button></form>",
        "<select><option>noise</select>",
        "<svg><title>noise</title></svg>",
        "<!-- noise -->",
        "<ul><li><a hreflang=de href=/de>noise</a><li><a hreflang=fr href=/fr>noise</a></ul>",
    ],
)
def test_what_is_no_content_is_dropped(noise: str) -> None:
    assert markdown(f"<body><h1>T</h1>{noise}<p>kept</p>{noise}</body>") == "# T\n\nkept"


def test_header_and_footer_of_an_article_are_content() -> None:
    html = "<article><header><h1>T</h1>by me</header><p>x</p><footer>sources</footer></article>"
    assert markdown(html) == "# T\n\nby me\n\nx\n\nsources"


def test_a_form_around_the_whole_page_loses_its_controls_only() -> None:
    assert markdown("<form><h1>T</h1><p>kept</p><input value=noise><button>noise</button></form>") == "# T\n\nkept"


def test_the_main_part_is_taken_alone() -> None:
    text = "words " * 50
    html = f"<div>menu menu</div><main><h1>T</h1><p>{text}</main><div>cookies</div>"
    assert markdown(html) == f"# T\n\n{text.strip()}"


def test_a_main_part_without_substance_is_not_trusted() -> None:
    assert "the text" in markdown(f"<main>x</main><p>the text {'words ' * 50}")


def test_a_page_without_heading_is_headed_by_its_title() -> None:
    assert markdown("<title> The  Title </title><p>x") == "# The Title\n\nx"
    assert markdown("<title>T</title><header><h1>Name</h1></header><p>x") == "# Name\n\nx"
    assert markdown("<title>T</title><h1>Own</h1><p>x") == "# Own\n\nx"


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<table><tr><th>A<th>B<tr><td>1<td>2</table>", "| A | B |\n| --- | --- |\n| 1 | 2 |"),
        (
            "<table><thead><tr><th>A<th>B</thead><tbody><tr><td>1|x<td><p>2</p><p>3</p></tbody></table>",
            "| A | B |\n| --- | --- |\n| 1\\|x | 2 3 |",
        ),
        (
            "<table><tr><td colspan=2>A<td>B<tr><td rowspan=2>1<td>2<td>3<tr><td>4<td>5</table>",
            "| A |  | B |\n| --- | --- | --- |\n| 1 | 2 | 3 |\n|  | 4 | 5 |",
        ),
        ("<table><caption>C</caption><tr><th>A<tr><td>1</table>", "C\n\n| A |\n| --- |\n| 1 |"),
        ("<table><tr><td>A<td>B<tr><td>1</table>", "| A | B |\n| --- | --- |\n| 1 |  |"),
        (
            "<table><tr><td><table><tr><th>A<tr><td>1</table><td><p>side</table>",
            "| A |\n| --- |\n| 1 |\n\nside",
        ),
        ("<table><tr><td>one cell</table>", "one cell"),
        ("<table><tr><td><pre>a\nb</pre><td>x</table>", "```\na\nb\n```\n\nx"),
        ("<table></table><p>x", "x"),
        (
            '<table><tr><th colspan="99999999999" rowspan="-1">A<tr><td colspan=x>1</table>',
            "| A |\n| --- |\n| 1 |",
        ),
    ],
)
def test_tables_become_pipe_tables(html: str, expected: str) -> None:
    assert markdown(html) == expected


@pytest.mark.parametrize(
    "content",
    [
        "<meta charset=windows-1251><p>Привет".encode("cp1251"),
        '<?xml version="1.0" encoding="windows-1251"?><html><body>Привет</body></html>'.encode("cp1251"),
        "<meta http-equiv=Content-Type content='text/html; charset=koi8-r'><p>Привет".encode("koi8-r"),
        "<p>Привет".encode(),
        "<p>Привет".encode("utf-16"),
        "<meta charset=utf-16><p>Привет".encode(),
        "<meta charset=no-such-set><p>Привет".encode(),
    ],
)
def test_the_character_set_is_found(content: bytes) -> None:
    assert html_markdown(content) == "Привет"


def test_form_feeds_do_not_pass_for_page_ends() -> None:
    assert "\f" not in markdown("<p>a\fb<pre>c\fd</pre>")


def test_a_fragment_keeps_everything_but_pictures() -> None:
    html = '<h2>A</h2><p>x<img alt="chart" src="data:..."/></p><ul><li>b</li></ul>'
    assert fragment_markdown(html) == "## A\n\nxchart\n\n- b"


def test_the_second_call_gives_the_same() -> None:
    html = "<h1 class='b a c'>T</h1><table><tr><td>1<td>2<tr><td>3<td>4</table>"
    assert markdown(html) == markdown(html)
