"""How data is laid out as text. Knows nothing of what it shows."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, without trailing blanks."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def plain(text: str) -> str:
    """The text itself if it is printable ASCII, else quoted and escaped: nothing else may reach a terminal."""
    return text if text.isascii() and text.isprintable() else ascii(text)


def shortened(text: str, most: int) -> str:
    """At most so many characters, the end cut off and marked by two dots."""
    return text if len(text) <= most else text[: most - 2] + ".."
