"""Cuts a SQL file into its statements, by Postgres's lexical rules.

Source of the rules: PostgreSQL 18 documentation, section 4.1 "Lexical Structure", and for the bodies `begin atomic …
end` the reference of `create function`. Statements end at a semicolon that stands outside quotes, comments,
parentheses and such bodies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_TOKEN = re.compile(
    r"""
      (?P<space> \s+ )
    | (?P<comment> --[^\n]* )
    | (?P<block> /\* )
    | (?P<escaped> [eE]'(?: [^'\\] | '' | \\. )*' (?: \s*\n\s*'(?: [^'\\] | '' | \\. )*' )* )
    | (?P<quoted> '(?: [^'] | '' )*' | "(?: [^"] | "" )*" )
    | (?P<dollar> \$ (?: [A-Za-z_\u0080-\uffff][A-Za-z0-9_\u0080-\uffff]* )? \$ )
    | (?P<word> [A-Za-z_\u0080-\uffff][A-Za-z0-9_$\u0080-\uffff]* )
    | (?P<number> [0-9][A-Za-z0-9_.]* )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_BLOCK_PART = re.compile(r"/\*|\*/")


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement of a file.

    Attributes:
        text: without the semicolon, and without space or comments around it.
        line: in the file where it begins, from 1.
        words: its lexemes without comments and space; equal for two spellings of the same statement.
    """

    text: str
    line: int
    words: tuple[str, ...]


def split_statements(sql: str) -> tuple[Statement, ...]:
    """Cuts a file into statements.

    What is not closed (a quote, a comment) runs to the end, where the server will name it.

    Args:
        sql: the file's text.
    """
    statements: list[Statement] = []
    words: list[str] = []
    begin = end = 0
    parentheses = blocks = 0
    for start, stop in _lexemes(sql):
        lexeme = sql[start:stop]
        if lexeme == ";" and parentheses <= 0 and blocks == 0:
            if words:
                statements.append(Statement(sql[begin:end], sql.count("\n", 0, begin) + 1, tuple(words)))
            words, parentheses = [], 0
            continue
        if not words:
            begin = start
        parentheses += (lexeme == "(") - (lexeme == ")")
        word = lexeme.lower()
        if blocks:
            blocks += (word in ("begin", "case")) - (word == "end")
        elif word == "atomic" and words and words[-1].lower() == "begin":
            blocks = 1
        words.append(lexeme)
        end = stop
    if words:
        statements.append(Statement(sql[begin:end], sql.count("\n", 0, begin) + 1, tuple(words)))
    return tuple(statements)


def _lexemes(sql: str) -> Iterator[tuple[int, int]]:
    """Start and end of each lexeme that is neither space nor comment."""
    position = 0
    while position < len(sql):
        match = _TOKEN.match(sql, position)
        if match is None:  # cannot be: the last alternative takes any character
            raise AssertionError(position)
        start, position = match.span()
        if match.lastgroup == "block":
            position = _block_end(sql, start)
        elif match.lastgroup == "dollar":
            close = sql.find(match.group(), position)
            position = len(sql) if close < 0 else close + len(match.group())
        if match.lastgroup not in ("space", "comment", "block"):
            yield start, position


def _block_end(sql: str, start: int) -> int:
    depth = 0
    for part in _BLOCK_PART.finditer(sql, start):
        depth += 1 if part.group() == "/*" else -1
        if depth == 0:
            return part.end()
    return len(sql)
