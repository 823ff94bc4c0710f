"""Taking from a page what is not its content: scripts, navigation, forms, what is hidden."""

from __future__ import annotations

import re

from bs4 import BeautifulSoup, Tag

_NEVER_CONTENT = frozenset(
    {"script", "style", "noscript", "template", "iframe", "object", "embed", "svg", "canvas", "audio", "video", "map"}
    | {
        "head",
        "title",
        "nav",
        "dialog",
        "menu",
        "button",
        "input",
        "select",
        "textarea",
        "datalist",
        "progress",
        "meter",
    }
)
_PAGE_CHROME = ("header", "footer", "aside")
"""Chrome of the page, but content inside an article."""
_CONTENT_PARTS = ("main", "article", "section")
_CHROME_ROLES = frozenset({"navigation", "banner", "contentinfo", "search", "complementary", "dialog", "menu"})
_NOISE_CLASSES = frozenset(
    {"noprint", "sr-only", "visually-hidden", "screen-reader-text"}
    | {"headerlink", "hash-link", "anchor-link", "mw-editsection"}
)
"""Classes that popular page generators give to what only a screen, or only a screen reader, is meant to have."""
_HIDING_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_DEAD_LINK = re.compile(r"\s*(?:#|javascript:|data:|vbscript:|$)", re.IGNORECASE)
_HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]
_BLOCKS = [*_HEADINGS, "p", "div", "ul", "ol", "dl", "table", "pre", "blockquote", "article", "section"]
_MAIN_CHARS = 200
"""A main part with less text than this, and less than half of the page's, is not trusted to be the content."""


def content_of_page(soup: BeautifulSoup) -> Tag:
    """Prunes a page and picks the part that holds its content.

    That part is the page's one main element, else everything. A page without a top heading gets
    one: the first top heading outside that part, else the page's title.

    Args:
        soup: the parsed page; it is changed.
    """
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    top = soup.find("h1")
    top_text = top.get_text(" ", strip=True) if top else ""
    _remove_noise(soup)
    root = _main_part(soup)
    if root.find("h1") is None and (top_text or title):
        heading = soup.new_tag("h1")
        heading.string = top_text or title
        root.insert(0, heading)
    tidy_inline(root)
    return root


def tidy_inline(root: Tag) -> None:
    """Makes images their alternative text, and frees text from links that lead nowhere or wrap blocks."""
    for image in root.find_all("img"):
        image.replace_with(_attribute(image, "alt").strip())
    for link in root.find_all("a"):
        link.attrs.pop("title", None)  # says what the link's text says
        dead = _DEAD_LINK.match(_attribute(link, "href")) is not None
        if dead or link.find(_BLOCKS) is not None or link.find_parent(_HEADINGS) is not None:
            link.unwrap()


def _remove_noise(soup: BeautifulSoup) -> None:
    doomed = [tag for tag in soup.find_all(True) if _is_noise(tag)]
    for tag in doomed:
        if not tag.decomposed:
            tag.decompose()
    for choices in soup.find_all("ul"):
        links = choices.find_all("a")
        if len(links) > 1 and all(link.has_attr("hreflang") for link in links):
            choices.decompose()  # the page in other languages
    for form in soup.find_all("form"):
        # Some frameworks wrap the whole page in one form.
        if form.find([*_HEADINGS, "p", "table", "article"]) is not None:
            form.unwrap()
        else:
            form.decompose()


def _is_noise(tag: Tag) -> bool:
    if tag.name in ("html", "body", "main"):
        return False  # often hidden until a script has run
    if tag.name in _NEVER_CONTENT:
        return True
    if tag.name in _PAGE_CHROME and tag.find_parent(_CONTENT_PARTS) is None:
        return True
    if not tag.attrs:
        return False
    return (
        tag.has_attr("hidden")
        or _attribute(tag, "aria-hidden") == "true"
        or _attribute(tag, "role") in _CHROME_ROLES
        or not _NOISE_CLASSES.isdisjoint(_attribute(tag, "class").split())
        or _HIDING_STYLE.search(_attribute(tag, "style")) is not None
    )


def _main_part(soup: BeautifulSoup) -> Tag:
    mains = soup.select("main, [role=main]")
    outermost = [main for main in mains if main.find_parent(_is_main) is None]
    if len(outermost) != 1:
        return soup
    held, total = len(outermost[0].get_text()), len(soup.get_text())
    return outermost[0] if held >= _MAIN_CHARS or held * 2 >= total else soup


def _is_main(tag: Tag) -> bool:
    return tag.name == "main" or _attribute(tag, "role") == "main"


def _attribute(tag: Tag, name: str) -> str:
    value = tag.attrs.get(name, "")
    return " ".join(value) if isinstance(value, list) else str(value or "")
