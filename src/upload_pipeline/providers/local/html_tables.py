"""Making tables of HTML into grids that Markdown can hold: one head row, rows of equal width, no spans."""

from __future__ import annotations

from bs4 import BeautifulSoup, Tag

_MOST_COLUMNS = 1000
"""HTML's own bound on `colspan` (HTML Standard, section 4.9.11)."""
_PARTS = ["thead", "tbody", "tfoot", "tr", "td", "th", "caption", "colgroup", "col"]


def square_tables(root: Tag, soup: BeautifulSoup) -> None:
    """Squares each table under `root`; tables that only lay out a page become plain blocks."""
    for table in root.find_all("table"):
        if _is_layout(table):
            _flatten(table)
    for table in root.find_all("table"):
        for listing in table.find_all("pre"):
            listing.name = "code"  # a cell is one line
        _square(table, soup)


def _is_layout(table: Tag) -> bool:
    if table.find("table") is not None or table.get("role") in ("presentation", "none"):
        return True
    rows = table.find_all("tr")
    if len(rows) > 1:
        return False
    cells = table.find_all(["td", "th"])
    # One row around a listing is how highlighters put line numbers beside code.
    return len(cells) <= 1 or any("\n" in code.get_text().strip() for code in table.select("pre"))


def _flatten(table: Tag) -> None:
    own = [part for part in table.find_all(_PARTS) if part.find_parent("table") is table]
    for part in own:
        if part.name in ("colgroup", "col"):
            part.decompose()
        else:
            part.name = "div"
    table.name = "div"


def _square(table: Tag, soup: BeautifulSoup) -> None:
    caption = table.find("caption")
    if isinstance(caption, Tag):
        caption.extract()
        caption.name = "p"
        table.insert_before(caption)
    grid = _grid(table)
    width = max((len(row) for row in grid), default=0)
    used = [column for column in range(width) if any(column < len(row) and _has_text(row[column]) for row in grid)]
    rows = [[row[column] if column < len(row) else None for column in used] for row in grid]
    rows = [row for row in rows if any(_has_text(cell) for cell in row)]
    if not rows:
        table.decompose()
        return
    new_rows = []
    for number, row in enumerate(rows):
        new_row = soup.new_tag("tr")
        for cell in row:
            new_cell = soup.new_tag("td") if cell is None else cell.extract()
            new_cell.name = "td" if number else "th"
            new_row.append(new_cell)
        new_rows.append(new_row)
    table.clear()
    for new_row in new_rows:
        table.append(new_row)


def _grid(table: Tag) -> list[list[Tag | None]]:
    """Lays cells out as a browser does: a spanning cell stands in the first place that it covers."""
    grid: list[list[Tag | None]] = []
    covered: dict[int, int] = {}  # column -> rows below that a cell above still covers
    for row in table.find_all("tr"):
        line: list[Tag | None] = []
        for cell in row.find_all(["td", "th"], recursive=False):
            _skip_covered(line, covered)
            span, depth = _span(cell, "colspan"), _span(cell, "rowspan")
            for offset in range(span):
                if depth > 1:
                    covered[len(line)] = depth - 1
                line.append(None if offset else cell)
                if len(line) >= _MOST_COLUMNS:
                    break
        _skip_covered(line, covered)
        grid.append(line)
    return grid


def _skip_covered(line: list[Tag | None], covered: dict[int, int]) -> None:
    while covered.get(len(line), 0) > 0 and len(line) < _MOST_COLUMNS:
        covered[len(line)] -= 1
        line.append(None)


def _span(cell: Tag, name: str) -> int:
    value = cell.attrs.pop(name, "1")
    text = str(value).strip()
    return max(1, min(_MOST_COLUMNS, int(text))) if text.isascii() and text.isdigit() and len(text) < 10 else 1


def _has_text(cell: Tag | None) -> bool:
    return cell is not None and bool(cell.get_text(strip=True))
