"""Tables and errors as plain text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], numbers: bool) -> list[str]:
    """Return a line of text for each row, with the columns aligned and two spaces apart.

    Args:
        rows: one or more rows of cells.
        numbers: whether to align the columns after the first on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if numbers and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
