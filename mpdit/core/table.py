"""Tables of text: columns padded for a terminal, or Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return lines of columns as wide as their widest cell, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are flush left; columns without any entry are left out."""
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    rule = [":--" if i < left else "--:" for i in used]
    cells = [[row[i].replace("|", "/").replace("\n", " ") for i in used] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in ([head[i] for i in used], rule, *cells))
