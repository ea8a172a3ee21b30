"""A page for a browser from plain data: text, tables that sort, charts with their data. One file that needs no network.

    page.write(path, page.render("Title", "what it is", [page.Section("Results", [page.Paragraph("…"), page.Table(…)])]))

Whatever is put in is shown as it is: only `Text`, captions and notes know **bold** and `code`, and nothing knows HTML. The
page's Content-Security-Policy runs the two scripts that `render` puts into it, by their hashes, and no other.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import altair as alt
import vl_convert

from lorakin.errors import OutputError
from lorakin.storage import atomic

GENERATOR = '<meta name="generator" content="lorakin">'
MISSING = "–"


class Block(Protocol):
    """What a section is made of."""

    def html(self, name: str) -> str:
        """The block as HTML; `name` is no other block's on the page and begins its ids."""


class Paragraph:
    """Paragraphs, in which **bold** and `code` are known."""

    def __init__(self, *paragraphs: str) -> None:
        self.paragraphs = paragraphs

    def html(self, name: str) -> str:
        return "".join(f"<p>{_marked_up(paragraph)}</p>" for paragraph in self.paragraphs)


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines to copy, with a button for it."""

    caption: str
    text: str

    def html(self, name: str) -> str:
        return (
            f'<figure class="code" aria-labelledby="{name}-caption"><figcaption id="{name}-caption">{_marked_up(self.caption)}'
            f'</figcaption><pre tabindex="0"><code>{escape(self.text)}</code></pre></figure>'
        )


class Column(NamedTuple):
    """A column's heading, what it means in a sentence, and whether it holds numbers, set to the right."""

    title: str
    help: str = ""
    numeric: bool = True


class Cell(NamedTuple):
    """What a cell shows, and what it is sorted by: without a value it comes last, whichever way one sorts."""

    text: str
    value: float | str | None = None


Value = Cell | str | float | None
"""A number is shown with four digits, None as a dash. Text in a numeric column has no value."""


@dataclasses.dataclass(frozen=True)
class TableRow:
    """Cells, the first of which names the row. The `mark` stands beside it: "best", "control", "failed", or any other word."""

    cells: Sequence[Value]
    mark: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table that sorts by any column, unless it is not `sortable`. The note stands below it."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[TableRow | Sequence[Value]]
    note: str = ""
    sortable: bool = True

    def html(self, name: str) -> str:
        sort = ' class="sortable"' if self.sortable else ""
        heads = "".join(
            f'<th scope="col"{_numeric(column)}>{escape(column.title)}</th>'
            for column in self.columns
        )
        return (
            f'<div class="table"><div class="scroll" tabindex="0" role="region" aria-labelledby="{name}-caption">'
            f'<table{sort}><caption id="{name}-caption">{_marked_up(self.caption)}</caption><thead><tr>{heads}</tr></thead>'
            f"<tbody>{''.join(map(self._row, self.rows))}</tbody></table></div>{self._help()}{_note(self.note)}</div>"
        )

    def _row(self, row: TableRow | Sequence[Value]) -> str:
        row = row if isinstance(row, TableRow) else TableRow(row)
        kind = f' class="mark-{re.sub("[^a-z0-9]+", "-", row.mark.lower())}"' if row.mark else ""
        mark = f' <span class="mark">{escape(row.mark)}</span>' if row.mark else ""
        cells = []
        for number, (column, value) in enumerate(zip(self.columns, row.cells, strict=True)):
            cell = _cell(value, column)
            key = f' data-value="{escape(str(cell.value))}"' if _sorts(cell.value) else ""
            tag, scope = ("td", "") if number else ("th", ' scope="row"')
            cells.append(
                f"<{tag}{scope}{_numeric(column)}{key}>{escape(cell.text)}{'' if number else mark}</{tag}>"
            )
        return f"<tr{kind}>{''.join(cells)}</tr>"

    def _help(self) -> str:
        said = "".join(
            f"<dt>{escape(c.title)}</dt><dd>{_marked_up(c.help)}</dd>"
            for c in self.columns
            if c.help
        )
        return (
            f"<details><summary>What the columns mean</summary><dl>{said}</dl></details>"
            if said
            else ""
        )


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart, or several side by side by their titles; what it shows in plain words; and its data, for whom it is no picture.

    Charts of `width="container"` fill what room there is. Colours that a chart leaves open are the page's, light or dark.
    """

    title: str
    caption: str
    chart: alt.TopLevelMixin | Mapping[str, alt.TopLevelMixin]
    data: Table

    def html(self, name: str) -> str:
        charts = {"": self.chart} if isinstance(self.chart, alt.TopLevelMixin) else self.chart
        panels = "".join(
            f'<div class="panel"><p>{escape(title)}</p>{self._plot(name, chart)}</div>'
            if title
            else self._plot(name, chart)
            for title, chart in charts.items()
        )
        return (
            f'<figure class="chart" aria-labelledby="{name}-title"><h3 id="{name}-title">{escape(self.title)}</h3>'
            f'<div class="panels" role="img" aria-labelledby="{name}-title" aria-describedby="{name}-caption">{panels}</div>'
            f'<figcaption id="{name}-caption">{_marked_up(self.caption)}</figcaption>'
            f"<details><summary>Data of this figure</summary>{self.data.html(f'{name}-data')}</details></figure>"
        )

    @staticmethod
    def _plot(name: str, chart: alt.TopLevelMixin) -> str:
        spec = json.dumps(_without_infinities(chart.to_dict()), separators=(",", ":")).replace(
            "<", "\\u003c"
        )
        return f'<div class="plot"></div><script type="application/json">{spec}</script>'


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it; folded away at first if not `open`."""

    title: str
    blocks: Sequence[Block]
    open: bool = True

    def html(self, name: str) -> str:
        heading = f'<h2 id="{name}-title">{escape(self.title)}</h2>'
        inner = "".join(
            block.html(f"{name}-{number}") for number, block in enumerate(self.blocks, 1)
        )
        inner = (
            heading + inner
            if self.open
            else f"<details><summary>{heading}</summary>{inner}</details>"
        )
        return f'<section id="{name}" aria-labelledby="{name}-title">{inner}</section>'


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page, about a megabyte for the charts' library."""
    names = [f"s{number}" for number in range(1, len(sections) + 1)]
    links = "".join(
        f'<li><a href="#{name}">{escape(s.title)}</a></li>'
        for name, s in zip(names, sections, strict=True)
    )
    main = "".join(section.html(name) for name, section in zip(names, sections, strict=True))
    style, library, script = _asset("page.css"), _library(), _asset("page.js")
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the content</a>\n'
        f'<header><h1>{escape(title)}</h1><p class="subtitle">{_marked_up(subtitle)}</p></header>\n'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n'
        "<noscript><p>Charts and sorting need JavaScript. The data of every chart stands below it as a table.</p></noscript>\n"
        f'<main id="main" tabindex="-1">{main}</main>\n'
        "<footer><p>Made by lorakin. Everything on this page is in this file.</p>"
        f"<details><summary>Licences of the code that draws the charts</summary><pre>{escape(_asset('licences.txt'))}</pre>"
        "</details></footer>\n"
        f"<script>{library}</script>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def write(path: Path, html: str) -> None:
    """Write the page whole or not at all. A page that lorakin made before is replaced.

    Raises:
        OutputError: it cannot be written, or `path` is a file that lorakin did not make.
    """
    try:
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                if GENERATOR not in file.read(1000):
                    raise OutputError(
                        f"{path} is there already and no page of lorakin's; remove it, or choose another name"
                    )
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error
    atomic.write(path.parent, {path.name: html.encode()})


def _marked_up(text: str) -> str:
    """Text as HTML, with its **bold** and `code`."""
    parts = re.split(r"`([^`]+)`", text)
    bold = [re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(part)) for part in parts[::2]]
    code = [f"<code>{escape(part)}</code>" for part in parts[1::2]]
    return "".join(a + b for a, b in zip(bold, [*code, ""], strict=True))


def _cell(value: Value, column: Column) -> Cell:
    if isinstance(value, Cell):
        return value
    if isinstance(value, str):
        return Cell(value, None if column.numeric else value)
    if value is None or not math.isfinite(value):
        return Cell(MISSING if value is None else str(value))
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", value)


def _sorts(value: float | str | None) -> bool:
    return isinstance(value, str) or (value is not None and math.isfinite(value))


def _numeric(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _note(note: str) -> str:
    return f'<p class="note">{_marked_up(note)}</p>' if note else ""


def _without_infinities(value: Any) -> Any:
    """Data as JSON has it: NaN and infinities, for which it has no word, are missing."""
    if isinstance(value, Mapping):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed, as one script."""
    return (
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
        .replace("</script", "<\\/script")
        .replace("<!--", "<\\!--")
    )


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("lorakin.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
