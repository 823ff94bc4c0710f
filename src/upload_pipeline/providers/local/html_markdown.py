"""HTML to Markdown: headings, tables, lists, code and links stay, everything that is not content goes."""

from __future__ import annotations

import re
import warnings

from bs4 import BeautifulSoup, Tag, XMLParsedAsHTMLWarning
from markdownify import MarkdownConverter

from upload_pipeline.providers.local.html_pruning import content_of_page, tidy_inline
from upload_pipeline.providers.local.html_tables import square_tables
from upload_pipeline.providers.local.text_markdown import decode

_META_BYTES = 4096
"""Where a page may name its character set: browsers look at 1,024 bytes, generators put it later."""
_META_CHARSET = re.compile(rb"""<meta[^>]{0,400}?charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{1,40})""", re.IGNORECASE)
_XML_ENCODING = re.compile(rb"""^\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9_.:-]{1,40})""")
_CODE_LANGUAGE = re.compile(r"^(?:language|lang|highlight-source|highlight|brush:?)-?([A-Za-z0-9+#_-]{1,30})$")
_BLOCK_START = re.compile(r"(?m)^(#{1,6}(?=\s)|[-+*](?=\s)|>|`{3,}|~{3,})|^(\d{1,9})([.)])(?=\s)")
_SPACES = re.compile(r" {2,}")
_LINE_BREAKS = re.compile(r"\s*\n\s*")
_FENCE = re.compile(r"^\s*(`{3,})", re.MULTILINE)


def html_markdown(content: bytes) -> str:
    """Turns a page into Markdown.

    Args:
        content: the page's bytes; its character set is found as `text_markdown.decode` says, after what the
            page itself declares.
    """
    head = content[:_META_BYTES]
    declared = [
        match.group(1).decode("ascii") for pattern in (_XML_ENCODING, _META_CHARSET) if (match := pattern.search(head))
    ]
    # A page that can be read far enough to find these words in it is not in UTF-16, whatever it says.
    declared = ["utf-8" if label.lower().startswith(("utf-16", "utf-32")) else label for label in declared]
    soup = _parsed(decode(content, declared))
    return _converted(content_of_page(soup), soup)


def fragment_markdown(html: str) -> str:
    """Turns HTML that is content throughout, as another converter made it, into Markdown."""
    soup = _parsed(html)
    tidy_inline(soup)
    return _converted(soup, soup)


def _parsed(html: str) -> BeautifulSoup:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # XHTML under its XML declaration is HTML to us
        return BeautifulSoup(html.replace("\f", " "), "lxml")


def _converted(root: Tag, soup: BeautifulSoup) -> str:
    square_tables(root, soup)
    for ordered in root.find_all("ol"):
        start = str(ordered.get("start", "1"))
        number = int(start) if start.isascii() and start.isdigit() and len(start) < 10 else 1
        for item in ordered.find_all("li", recursive=False):
            item["value"] = str(number)
            number += 1
    text: str = _Converter(
        heading_style="atx",
        escape_asterisks=False,
        escape_underscores=False,
        code_language_callback=_code_language,
        strip_pre=None,
    ).convert_soup(root)
    return text.strip("\n")


def _code_language(pre: Tag) -> str:
    for tag in (pre, pre.find("code"), pre.parent, pre.parent.parent if pre.parent else None):
        if isinstance(tag, Tag):
            classes = tag.get("class")
            for name in classes if isinstance(classes, list) else []:
                match = _CODE_LANGUAGE.match(name)
                if match:
                    return match.group(1).lower()
    return ""


class _Converter(MarkdownConverter):
    """Markdownify with rules of ours where its own break on real pages or take quadratic time."""

    def escape(self, text: str, parent_tags: set[str]) -> str:
        # Only what would turn text into structure: escaped words are not found by those who search for them.
        return _BLOCK_START.sub(lambda match: f"\\{match[1]}" if match[1] else f"{match[2]}\\{match[3]}", text)

    def convert_br(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        if "pre" in parent_tags:
            return "\n"
        return " " if "_inline" in parent_tags else "  \n"

    def convert_pre(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        body = text.strip("\n").rstrip()
        if not body.strip():
            return ""
        longest = max((len(match) for match in _FENCE.findall(body)), default=2)
        fence = "`" * (longest + 1)
        return f"\n\n{fence}{_code_language(el)}\n{body}\n{fence}\n\n"

    def convert_li(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        body = (text or "").strip()
        if not body:
            return "\n"
        ordered = el.parent is not None and el.parent.name == "ol"
        marker = f"{el.get('value', '1')}. " if ordered else "- "
        first, *rest = body.split("\n")
        indent = " " * len(marker)
        return "\n".join([marker + first, *(indent + line if line else "" for line in rest)]) + "\n"

    def convert_td(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        line = _SPACES.sub(" ", _LINE_BREAKS.sub(" ", text.strip()))
        return " " + line.replace("|", "\\|") + " |"

    convert_th = convert_td

    def convert_tr(self, el: Tag, text: str, parent_tags: set[str]) -> str:
        if el.parent is None or el.parent.name != "table":
            return f"{text}\n"
        line = f"|{text}\n"
        if el.previous_sibling is None:
            line += "|" + " --- |" * len(el.contents) + "\n"
        return line
