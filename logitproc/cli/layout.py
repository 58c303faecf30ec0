"""Text in columns."""

import itertools
import shutil
import textwrap
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Rows as aligned lines; with `right`, all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right and at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def side_by_side(heads: Sequence[str], texts: Sequence[str]) -> str:
    """Two texts in two columns, as wide as the terminal and at most 100 characters."""
    width = (min(100, shutil.get_terminal_size((100, 24)).columns) - 3) // 2
    columns = []
    titles = [textwrap.wrap(head, width) for head in heads]
    height = max(map(len, titles))
    for title, text in zip(titles, texts, strict=True):
        wrapped = [line for part in text.strip().splitlines() for line in textwrap.wrap(part, width) or [""]]
        columns.append([*title, *[""] * (height - len(title)), "-" * width, *wrapped])
    lines = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(f"{left.ljust(width)} | {right}".rstrip() for left, right in lines)
