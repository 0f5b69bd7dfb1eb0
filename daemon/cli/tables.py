"""Rows of values on a terminal of any width: a table where it fits, else a block for each row. Nothing is cut."""

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence

GAP = "  "
BESIDE = 40
"""Columns that a sentence needs at least to stand beside the rest of its row; with fewer it stands below."""


def screen_width() -> int:
    """Return the columns of the terminal. What goes into a pipe or a file is not folded, unless COLUMNS says so."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return sys.maxsize


def table(rows: Sequence[Mapping[str, object]], width: int, *, sentence: str) -> list[list[str]]:
    """Lay rows out: the lines of the header, then those of each row.

    Args:
        rows: One or more, with the same keys. Numbers stand at the right of their column.
        width: Of the screen, in columns.
        sentence: The key of the text that may be long: it is folded, beside the other columns or below them.
    """
    texts = [{name: str(value) for name, value in row.items()} for row in rows]
    names = [name for name in rows[0] if name != sentence]
    widths = {name: max(_cells(name), *(_cells(text[name]) for text in texts)) for name in names}
    taken = sum(widths.values()) + len(GAP) * (len(names) - 1)
    if taken > width:
        return [[], *(_block(text, names, width, sentence) for text in texts)]

    def line(values: Mapping[str, str]) -> str:
        return GAP.join(_padded(values[name], widths[name], right=isinstance(rows[0][name], int)) for name in names)

    left = width - taken - len(GAP)
    longest = max(_cells(text[sentence]) for text in texts)
    beside = left >= min(longest, BESIDE)
    header = line({name: name for name in names}) + (GAP + sentence if beside and longest else "")
    laid_out = [[header.rstrip()]]
    for text in texts:
        first, *others = fold(text[sentence], left) if beside else ["", *fold(text[sentence], width - 4)]
        indent = " " * (taken + len(GAP) if beside else 4)
        laid_out.append([(line(text) + GAP + first).rstrip(), *(indent + other for other in others if other)])
    return laid_out


def _block(text: Mapping[str, str], names: Iterable[str], width: int, sentence: str) -> list[str]:
    """Lay one row out: its first value, then name and value of the others, then the sentence."""
    title, *others = names
    pairs = [f"{name} {text[name]}" for name in others if text[name]]
    lines = [text[title]]
    for pair in pairs:
        if len(lines) > 1 and _cells(lines[-1]) + 3 + _cells(pair) <= width:
            lines[-1] += "   " + pair
        else:
            lines.append(GAP + pair)
    return lines + [GAP + line for line in fold(text[sentence], width - len(GAP)) if line]


def fold(text: str, width: int) -> list[str]:
    """Break a text between words into lines of `width` columns. A word that is longer stays whole: it may be an address.

    Text without spaces (Chinese, Japanese) breaks between characters.
    """
    from rich.cells import chop_cells

    lines = [""]
    for word in text.split():
        parts = [word] if word.isascii() or _cells(word) <= width else chop_cells(word, width)
        for part in parts:
            if lines[-1] and _cells(lines[-1]) + 1 + _cells(part) > width:
                lines.append(part)
            else:
                lines[-1] = f"{lines[-1]} {part}".lstrip()
    return lines


def _padded(text: str, width: int, *, right: bool) -> str:
    space = " " * (width - _cells(text))
    return space + text if right else text + space


def _cells(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)
