"""Tables and errors as plain text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], numbers: bool) -> list[str]:
    """A line for each of one or more rows; their columns line up, two spaces apart.

    Args:
        numbers: whether the columns after the first line up on the right.
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
    """What went wrong: the first line of the message, or the type where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
