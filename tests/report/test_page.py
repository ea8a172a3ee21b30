"""The page: what it shows, that it runs nothing it is given, and what a reader can do with it."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair as alt
import pytest
from selenium.webdriver.common.keys import Keys

from lorakin.errors import OutputError
from lorakin.report import page
from lorakin.report.page import Cell, Code, Column, Figure, Paragraph, Section, Table, TableRow
from report.browser import Browser, browser

__all__ = ["browser"]
HOSTILE = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 2'>\"'&"
ARMS = Table(
    "Arms",
    [
        Column("arm", numeric=False),
        Column("loss", "Held out; **lower** is better."),
        Column("time"),
    ],
    [
        TableRow(["tenth", 10.0, Cell("2 min", 120)], "best"),
        TableRow(["second", 0.25, Cell("90 s", 90)], "control"),
        TableRow(["broken", "failed", None], "failed"),
        ["ninth", 0.5, Cell("1 h", 3600)],
        ["infinite", math.inf, Cell("?", math.nan)],
    ],
    note="Each `arm` once.",
)


def lines(label: str = "series") -> Any:
    rows = [{"x": x, "y": x * k, "of": f"{label} {k}"} for x in range(5) for k in range(3)]
    chart = alt.Chart(alt.InlineData(values=rows)).mark_line(point=True)
    return chart.encode(x="x:Q", y="y:Q", color="of:N").properties(width="container", height=120)


def heat() -> Any:
    rows = [{"x": x, "y": y, "v": float(x * y)} for x in range(4) for y in range(3)] + [
        {"x": 0, "y": 9, "v": math.nan}
    ]
    return (
        alt.Chart(alt.InlineData(values=rows))
        .mark_rect()
        .encode(x="x:O", y="y:O", color="v:Q")
        .properties(width="container", height=90)
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one of everything."""
    wide = Table(
        "Wide",
        [Column(f"column {n}") for n in range(30)],
        [[float(n) for n in range(30)]],
        sortable=False,
    )
    sections = [
        Section("Results", [Paragraph("It is **so**.", "Run `lorakin`."), ARMS, wide]),
        Section(
            "Pictures",
            [
                Figure("Lines", "They rise.", {"left": lines(), "right": lines()}, ARMS),
                Code("Copy:", "a: 1\nb: 2"),
            ],
        ),
        Section("More", [Figure("Heat", "It grows.", heat(), wide)], open=False),
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    page.write(path, page.render("A page", "of a test", sections))
    return path


@pytest.fixture
def opened(browser: Browser, file: Path) -> Iterator[Browser]:
    yield browser.open(file)
    assert browser.errors() == []


class Structure(html.parser.HTMLParser):
    """Tags with their attributes, and whether they close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_is_well_formed_and_its_ids_are_unique(file: Path) -> None:
    tags = Structure(file.read_text()).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids
        assert (
            not str(attributes.get("href", "#")).startswith("#")
            or str(attributes.get("href", "#s1"))[1:] in ids
        )
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in tags}


def test_the_library_is_there_once_and_most_of_the_page(file: Path) -> None:
    text = file.read_text()
    assert text.count("window.vegaEmbed") == 1
    assert 0.9 < len(page._library()) / len(text) < 1
    assert len(text) < 1.2e6
    assert not re.search(r"(?:src|href)=\"(?!#)", text.replace(page._library(), ""))


def test_what_cells_show_and_are_sorted_by() -> None:
    shown = re.findall(
        r'<t[dh](?: scope="row")?(?: class="number")?(?: data-value="(.*?)")?>(.*?)</t[dh]>',
        ARMS.html("t"),
    )
    assert shown[:3] == [
        ("tenth", 'tenth <span class="mark">best</span>'),
        ("10.0", "10"),
        ("120", "2 min"),
    ]
    assert shown[6:9] == [
        ("broken", 'broken <span class="mark">failed</span>'),
        ("", "failed"),
        ("", "–"),
    ]
    assert shown[9:] == [
        ("ninth", "ninth"),
        ("0.5", "0.5"),
        ("3600", "1 h"),
        ("infinite", "infinite"),
        ("", "inf"),
        ("", "?"),
    ]
    large = Table("", [Column("a"), Column("b")], [[1234567, 1234.5678]]).html("t")
    assert ">1,234,567<" in large
    assert ">1235<" in large


def test_a_row_with_too_few_cells_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Table("", [Column("a"), Column("b")], [[1]]).html("t")


def test_data_without_a_word_in_json_is_missing(file: Path) -> None:
    specs = re.findall(r'<script type="application/json">(.*?)</script>', file.read_text())
    assert len(specs) == 3

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (rows,) = json.loads(specs[2], parse_constant=refuse)["datasets"].values()
    assert rows[-1] == {"x": 0, "y": 9, "v": None}


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    for title in ("one", "two"):
        page.write(path, page.render(title, "", []))
    assert "<title>two</title>" in path.read_text()
    path.write_text("<!doctype html><p>mine")
    with pytest.raises(OutputError, match="page.html"):
        page.write(path, page.render("three", "", []))
    assert path.read_text() == "<!doctype html><p>mine"
    with pytest.raises(OutputError):
        page.write(tmp_path, page.render("three", "", []))
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        page.write(tmp_path / "file" / "page.html", page.render("three", "", []))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "new", "page.html"]


def test_everything_is_drawn_and_nothing_is_asked_of_the_network(
    opened: Browser, file: Path
) -> None:
    assert opened.marks()[:2] == [18, 18]
    assert opened.unfolded().marks() == [18, 18, 12]
    assert opened.requests() == [file.as_uri()]
    for figure in opened.run(
        "return [...document.querySelectorAll('.panels')].map(f => f.getAttribute('role'))"
    ):
        assert figure == "img"
    assert (
        opened.run("return document.querySelectorAll('figure.chart > details table').length") == 2
    )


def test_what_is_given_is_shown_and_never_run(browser: Browser, tmp_path: Path) -> None:
    table = Table(
        HOSTILE, [Column(HOSTILE, HOSTILE, numeric=False)], [TableRow([HOSTILE], HOSTILE)], HOSTILE
    )
    chart = Figure(HOSTILE, HOSTILE, {HOSTILE: lines(HOSTILE)}, table)
    path = tmp_path / "page.html"
    page.write(
        path,
        page.render(
            HOSTILE,
            HOSTILE,
            [Section(HOSTILE, [Paragraph(HOSTILE), chart, Code(HOSTILE, HOSTILE)], open=False)],
        ),
    )
    assert browser.open(path).unfolded().marks() == [18]
    assert browser.errors() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.run("return window.evil") is None
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.find("h1").text == HOSTILE
    assert browser.find("pre code").text == HOSTILE
    assert browser.find(".plot").text.count("<script>") == 3  # the legend


def test_the_policy_runs_no_other_script(browser: Browser, file: Path) -> None:
    browser.open(file).run(
        """const script = document.createElement('script');
        script.textContent = 'window.evil = 1';
        document.body.append(script)"""
    )
    assert browser.run("return window.evil") is None
    assert any("Content Security Policy" in message for message in browser.errors())


def order(browser: Browser) -> list[str]:
    rows = "[...document.querySelector('table.sortable').tBodies[0].rows]"
    return list(
        browser.run(f"return {rows}.map(row => row.cells[0].firstChild.textContent.trim())")
    )


def test_a_heading_sorts_by_click_and_by_key(opened: Browser) -> None:
    heads = opened.driver.find_elements(
        "css selector", "section > .table table.sortable th[scope=col]"
    )
    loss = heads[1].find_element("css selector", "button")
    loss.click()
    assert order(opened) == ["second", "ninth", "tenth", "broken", "infinite"]
    assert [head.get_attribute("aria-sort") for head in heads] == [None, "ascending", None]
    loss.send_keys(Keys.ENTER)
    assert order(opened) == ["tenth", "ninth", "second", "broken", "infinite"]
    assert heads[1].get_attribute("aria-sort") == "descending"
    heads[0].find_element("css selector", "button").send_keys(Keys.SPACE)
    assert order(opened) == ["broken", "infinite", "ninth", "second", "tenth"]
    assert [head.get_attribute("aria-sort") for head in heads] == ["ascending", None, None]
    assert (
        opened.run("return document.querySelectorAll('table:not(.sortable) thead button').length")
        == 0
    )


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_only_boxes_scroll_sideways(browser: Browser, file: Path, width: int) -> None:
    browser.open(file, width=width).unfolded()
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(
        """const box = document.querySelectorAll('.scroll')[1];
        return box.scrollWidth > box.clientWidth"""
    )
    rooms = browser.run(
        """return [...document.querySelectorAll('.plot')]
        .map(plot => [plot.clientWidth, plot.querySelector('svg').clientWidth])"""
    )
    assert all(0.9 * room < drawn <= room for room, drawn in rooms)


def test_charts_follow_the_width(opened: Browser) -> None:
    wide = opened.run("return document.querySelector('.plot svg').clientWidth")
    opened.resize(400)
    narrow = "return document.querySelector('.plot svg').clientWidth"
    opened.wait(lambda: opened.run(narrow) < min(wide, 380))


def test_the_theme_follows_the_system_while_the_page_is_open(opened: Browser) -> None:
    look = """const fill = (selector) => getComputedStyle(document.querySelector(selector)).fill;
        return [getComputedStyle(document.body).backgroundColor, fill('.role-axis-label text'),
                fill('.role-legend path[fill^=var]'),
                document.querySelector('#s3 .role-mark path[d]').getAttribute('fill')]"""
    light = opened.unfolded().run(look)
    opened.dark(True)
    opened.wait(lambda: all(a != b for a, b in zip(light, opened.drawn().run(look), strict=True)))
    assert opened.marks() == [18, 18, 12]
    opened.dark(False)
    opened.wait(lambda: opened.drawn().run(look) == light)


def test_in_print_everything_is_light_and_unfolded(opened: Browser) -> None:
    opened.dark(True).dark(True, paper=True).run("dispatchEvent(new Event('beforeprint'))")
    assert (
        opened.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    )
    assert opened.run("return document.querySelector('#s3 > details').open")
    assert (
        opened.run("return getComputedStyle(document.querySelector('.role-axis-label text')).fill")
        == "rgb(89, 97, 106)"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(browser: Browser, file: Path, dark: bool) -> None:
    browser.open(file, dark=dark)
    colours = browser.run(
        """const of = (selector, what) => getComputedStyle(document.querySelector(selector))[what];
        return arguments[0].map(
            ([text, paper]) => [text, of(text, 'color'), of(paper, 'backgroundColor')])""",
        [
            (text, "body")
            for text in (
                "body",
                ".subtitle",
                "nav a",
                "figcaption",
                "summary",
                ".note",
                ".mark-failed .mark",
            )
        ]
        + [
            (".mark-control .mark", "body"),
            (".mark-best .mark", ".mark-best"),
            (".code pre", ".code pre"),
        ],
    )
    for text, ink, paper in colours:
        bright, faint = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (bright + 0.05) / (faint + 0.05) >= 4.5, (text, ink, paper)


def luminance(colour: str) -> float:
    """Relative, as WCAG has it."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_link_unfolds_its_section_and_the_first_one_skips_to_the_content(opened: Browser) -> None:
    opened.find("body").send_keys(Keys.TAB)
    opened.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert opened.run("return document.activeElement.id") == "main"
    assert not opened.run("return document.querySelector('#s3 > details').open")
    opened.find("nav a[href='#s3']").click()
    opened.wait(lambda: opened.run("return document.querySelector('#s3 > details').open"))


def test_lines_are_copied(opened: Browser) -> None:
    opened.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    opened.find("figure.code button").click()
    opened.wait(lambda: opened.find("figure.code button").text == "Copied")
    copied = opened.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == "a: 1\nb: 2"
