"""Builds an HTML page from plain data: text, tables that sort, and charts with their data.

The page is one file and needs no network.

>>> table = Table("Losses", [Column("arm", numeric=False), Column("loss")], [["lora", 1.25]])
>>> section = Section("Results", [Paragraph("It is **done**."), table])
>>> "<p>It is <strong>done</strong>.</p>" in section.html("results")
True

`render` makes a page of sections, and `write` writes it.

Pages show the text they are given as it is and never as HTML: the templates beside this file
escape everything. Paragraphs, captions, notes and help texts may use **bold** and `code`. The
page's Content-Security-Policy allows two scripts, by their hashes: the charts' library and
`assets/page.js`.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup, escape

from lorakin.errors import OutputError
from lorakin.storage import atomic

GENERATOR = Markup('<meta name="generator" content="lorakin">')
"""Marks a page as ours, so that `write` may replace it."""
MISSING = "–"
"""What a table shows for None."""


class Block:
    """One piece of a section. A subclass holds data; the template named after it makes the HTML."""

    def html(self, name: str) -> Markup:
        """Returns the block as HTML.

        Args:
            name: begins the block's ids; no other block of the page has it.
        """
        template = _templates().get_template(f"{type(self).__name__.lower()}.html")
        return Markup(template.render(block=self, name=name))


@dataclasses.dataclass(frozen=True, init=False)
class Paragraph(Block):
    """One or more paragraphs of text, with **bold** and `code`.

    >>> print(Paragraph("Loss **fell** & `lr` rose.").html("p"), end="")
    <p>Loss <strong>fell</strong> &amp; <code>lr</code> rose.</p>
    """

    paragraphs: Sequence[str]

    def __init__(self, *paragraphs: str) -> None:
        object.__setattr__(self, "paragraphs", paragraphs)


@dataclasses.dataclass(frozen=True)
class Code(Block):
    """Lines to copy, with a button that copies them."""

    caption: str
    text: str


class Column(NamedTuple):
    """A table's column: its heading, a sentence on what it means, and whether it holds numbers.

    Numbers are aligned to the right.
    """

    title: str
    help: str = ""
    numeric: bool = True


class Cell(NamedTuple):
    """What a cell shows, and the value that sorting uses.

    Cells without a finite value come last in both directions.
    """

    text: str
    value: float | str | None = None

    @property
    def sorts(self) -> bool:
        """Whether the value can be sorted."""
        return isinstance(self.value, str) or (self.value is not None and math.isfinite(self.value))


Value = Cell | str | float | None
"""What a row holds. Numbers are shown with four digits, None as a dash.

Text in a numeric column, such as "failed", has no value to sort by."""


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row's cells, and a word that is shown beside the first one.

    The stylesheet colours the marks "best", "control" and "failed".
    """

    cells: Sequence[Value]
    mark: str = ""

    @property
    def mark_class(self) -> str:
        """The mark as a CSS class.

        >>> TableRow([], "Not yet run").mark_class
        'mark-not-yet-run'
        """
        return f"mark-{re.sub('[^a-z0-9]+', '-', self.mark.lower())}"


@dataclasses.dataclass(frozen=True)
class Table(Block):
    """A table with a note below it. A click on a heading sorts it, unless `sortable` is False."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[TableRow | Sequence[Value]]
    note: str = ""
    sortable: bool = True

    @property
    def table_rows(self) -> Iterator[TableRow]:
        """The rows; those without a mark have an empty one."""
        return (row if isinstance(row, TableRow) else TableRow(row) for row in self.rows)

    def cells(self, row: TableRow) -> list[tuple[Column, Cell]]:
        """Returns the row's cells, each with its column.

        Raises:
            ValueError: the row has more or fewer cells than the table has columns.
        """
        pairs = zip(self.columns, row.cells, strict=True)
        return [(column, _cell(value, column)) for column, value in pairs]


@dataclasses.dataclass(frozen=True)
class Figure(Block):
    """A chart, what it shows in words, and its data as a table for those who cannot see it.

    `chart` may also be several charts by title, which are shown side by side. A chart of
    `width="container"` fills the room there is. Colours that a chart does not set follow the
    page's theme, light or dark.
    """

    title: str
    caption: str
    chart: alt.TopLevelMixin | Mapping[str, alt.TopLevelMixin]
    data: Table

    @property
    def panels(self) -> dict[str, Any]:
        """Title → Vega-Lite specification; a single chart has the title ""."""
        charts = {"": self.chart} if isinstance(self.chart, alt.TopLevelMixin) else self.chart
        return {title: _finite(chart.to_dict()) for title, chart in charts.items()}


@dataclasses.dataclass(frozen=True)
class Section(Block):
    """A heading and its blocks. If `open` is False, the reader unfolds it with a click."""

    title: str
    blocks: Sequence[Block]
    open: bool = True


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Returns the page as HTML, about one megabyte because it holds the charts' library."""
    return (
        _templates()
        .get_template("page.html")
        .render(
            title=title,
            subtitle=subtitle,
            sections=sections,
            generator=GENERATOR,
            style=Markup(_asset("page.css")),
            library=Markup(_library()),
            script=Markup(_asset("page.js")),
            licences=_asset("licences.txt"),
        )
    )


def write(path: Path, html: str) -> None:
    """Writes the page to `path`, completely or not at all. Replaces a page of lorakin's only.

    Raises:
        OutputError: `path` cannot be written, or is a file that lorakin did not make.
    """
    try:
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                if GENERATOR not in file.read(1000):
                    raise OutputError(
                        f"{path} exists and is not a page made by lorakin; delete it or choose "
                        "another name"
                    )
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error
    atomic.write(path.parent, {path.name: html.encode()})


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lorakin.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(marked_up=_marked_up, sha256=_sha256)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def _marked_up(text: str) -> Markup:
    """Returns escaped text with its **bold** and `code` as HTML."""
    # The text in backquotes stands at odd places.
    pieces = [str(escape(piece)) for piece in re.split(r"`([^`]+)`", text)]
    bold = [re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", piece) for piece in pieces[::2]]
    code = [f"<code>{piece}</code>" for piece in pieces[1::2]]
    return Markup("".join(a + b for a, b in zip(bold, [*code, ""], strict=True)))


def _cell(value: Value, column: Column) -> Cell:
    if isinstance(value, Cell):
        return value
    if isinstance(value, str):
        return Cell(value, None if column.numeric else value)
    if value is None or not math.isfinite(value):
        return Cell(MISSING if value is None else str(value))
    return Cell(f"{value:,}" if isinstance(value, int) else f"{value:.4g}", value)


def _finite(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON lacks, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def _library() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script."""
    # Both words would end or hide the rest of the script element.
    return (
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
        .replace("</script", "<\\/script")
        .replace("<!--", "<\\!--")
    )


@functools.cache
def _asset(name: str) -> str:
    return (resources.files("lorakin.report") / "assets" / name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
