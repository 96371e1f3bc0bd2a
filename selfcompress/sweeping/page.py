"""A sweep's report: one HTML file with embedded figures and a sortable table."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from selfcompress.disk import write_atomically
from selfcompress.sweeping.curves import Picture
from selfcompress.sweeping.results import Result
from selfcompress.training.runs import NETWORK

REPORT = "report.html"

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }
figure { margin: 2em 0 } img { max-width: 100% } figcaption { color: #555 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #ddd }
th { cursor: pointer; border-bottom: 2px solid #888 }
th:first-child, td:first-child { text-align: left }
th[aria-sort=ascending]::after { content: " ▲" } th[aria-sort=descending]::after { content: " ▼" }
</style>
<h1>$title</h1>
$figures
<h2>Runs</h2>
<p>A click on a heading sorts. Sizes are in bytes and in percent of 32 bits for each weight at the
start; seconds are those of an epoch's training steps.</p>
<table>
<thead><tr>$headings</tr></thead>
<tbody>
$rows
</tbody>
</table>
<script>
const headings = [...document.querySelectorAll("th")], body = document.querySelector("tbody");
headings.forEach((heading, column) => heading.addEventListener("click", () => {
  const rising = heading.getAttribute("aria-sort") !== "ascending";
  headings.forEach(other => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const value = row => row.cells[column].dataset.value;
  const compare = (a, b) => a - b || String(a).localeCompare(b);
  [...body.rows].sort((a, b) => (rising ? 1 : -1) * compare(value(a), value(b)))
    .forEach(row => body.append(row));
}));
</script>
</html>
""")


def write_page(results: Sequence[Result], pictures: Sequence[Picture], root: Path) -> Path:
    """Write report.html into `root`, with links to the runs' folders there, and return its path."""
    columns = (
        "run", "γ", "seed", "test accuracy, %", "file, bytes", "stored, %", "weights left, %",
        "first epoch, s", "last epoch, s",
    )  # fmt: skip
    page = _PAGE.substitute(
        title=escape(f"Sweep {root.name}"),
        figures="\n".join(map(_figure, pictures)),
        headings="".join(f"<th>{column}</th>" for column in columns),
        rows="\n".join(map(_row, results)),
    )
    write_atomically(root / REPORT, page.encode())
    return root / REPORT


def _figure(picture: Picture) -> str:
    # As an image, since the identifiers inside one SVG would clash with those of the next.
    data = base64.b64encode(picture.svg).decode()
    return (
        f'<figure><img alt="{picture.name}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _row(result: Result) -> str:
    name, seconds = escape(result.name, quote=True), result.summary["seconds_per_epoch"]
    links = f'<a href="{name}/">{name}</a>'
    if (result.folder / NETWORK).exists():
        links += f' (<a href="{name}/{NETWORK}">{NETWORK}</a>)'
    cells = [
        (name, links),
        _cell(result.gamma, "g"),
        _cell(result.seed, "d"),
        _cell(100 * result.accuracy, ".2f"),
        _cell(result.file_bytes, ",d"),
        _cell(result.stored_percent, ".3f"),
        _cell(result.weights_percent, ".2f"),
        _cell(seconds[0], ".2f"),
        _cell(seconds[-1], ".2f"),
    ]
    return "<tr>" + "".join(f'<td data-value="{v}">{text}</td>' for v, text in cells) + "</tr>"


def _cell(value: float | None, form: str) -> tuple[str, str]:
    """Return the value to sort a cell by and the text to show; missing values sort first."""
    return ("-1", "–") if value is None else (str(value), format(value, form))
