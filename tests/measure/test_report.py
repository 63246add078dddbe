"""The page as a file (complete, self-contained, safe) and as a browser shows it."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from namr.data import images
from namr.errors import ShapeError
from namr.measure import report
from namr.measure.report import Fact, Grid, GridRow, Picture, ReportPage, Section, Table


def picture(color: str, **known: object) -> Picture:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), color).save(buffer, "JPEG")
    return Picture(image=buffer.getvalue(), label=color, **known)  # type: ignore[arg-type]


def full_page() -> ReportPage:
    neighbours = [
        picture("red", distance=0.25, correct=True),
        picture("blue", distance=0.5, correct=False),
        picture("gray", distance=0.75),
    ]
    query = replace(picture("red"), label="a_car_with_a_name_that_is_wider_than_the_window_of_a_phone_2012")
    return ReportPage(
        title="A <b>report</b>",
        subtitle="What was found",
        summary=[Fact(name="Recall@1", value="57.8 %", note="plain")],
        tables=[
            Table(title="Models", columns=["model", "R@1"], rows=[["a", "1.0"], ["b", "2.0"]], emphasis=[1])
        ],
        plots=[
            report.curves("Loss", {"total": [(0, 2.0), (10, 1.0)]}, x_label="step", y_label="loss & more"),
            report.bars("Recall", {"NAMR": {"plain": 57.8, "re-ranked": 57.2}}, x_label="percent"),
        ],
        grids=[
            Grid(
                title="Neighbours",
                rows=[GridRow(query=query, plain=neighbours, adaptive=neighbours[::-1])],
            )
        ],
    )


class Tags(HTMLParser):
    """Start tags with their attributes, and whether every element is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_a_page_shows_all_that_it_was_given() -> None:
    html = report.render(full_page())
    tags = Tags(html)
    assert tags.open == []
    classes = [figure["class"] for figure in tags.named("figure")]
    assert classes == ["query", "right", "wrong", "", "", "wrong", "right"]
    assert len(tags.named("svg")) == 2 and len(tags.named("img")) == 7
    for text in ("What was found", "57.8 %", "Models", "0.250", "Plain distance", "Adaptive distance"):
        assert text in html
    assert re.search(r'<tr class="strong"><th scope="row">b</th><td>2.0</td></tr>', html)


def test_a_page_needs_nothing_beside_itself() -> None:
    html = report.render(full_page())
    tags = Tags(html)
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in tags.named("img"))
    assert tags.named("script") == [] and tags.named("link") == []
    addresses = set(re.findall(r"(?:src|href)=\"(?!data:|#)([^\"]*)", html))
    assert addresses == set() and "@import" not in html
    assert "default-src 'none'" in html


def test_what_users_named_is_text_and_never_markup() -> None:
    evil = "<script>alert(1)</script>"
    row = GridRow(query=Picture(image=b"", label=evil), plain=[picture("red")])
    plot = report.bars(evil, {evil: {evil: 1.0}}, x_label=evil)
    table = Table(title=evil, columns=[evil], rows=[[evil]], note=evil)
    page = ReportPage(title=evil, tables=[table], plots=[plot], grids=[Grid(title=evil, rows=[row])])
    html = report.render(page)
    assert Tags(html).named("script") == [] and html.count("&lt;script&gt;") >= 8


def test_an_image_that_cannot_be_read_leaves_a_frame_with_the_reason() -> None:
    row = GridRow(query=picture("red"), plain=[Picture(image=b"junk", label=None, correct=False)])
    html = report.render(ReportPage(title="t", grids=[Grid(title="g", rows=[row])]))
    assert "not an image of a format" in html and "no label" in html and "Adaptive" not in html


def test_tiny_images_keep_their_pixels() -> None:
    digit = Picture(image=images.encode_png(np.eye(8, dtype=np.uint8) * 255), label="7")
    rows = [GridRow(query=digit, plain=[picture("red")])]
    tags = Tags(report.render(ReportPage(title="t", grids=[Grid(title="g", rows=rows)])))
    assert [image.get("class") for image in tags.named("img")] == ["tiny", None]


def test_an_empty_page_is_a_page() -> None:
    tags = Tags(report.render(ReportPage(title="nothing yet")))
    assert tags.open == [] and len(tags.named("section")) == 0


def test_the_same_page_is_the_same_text() -> None:
    assert report.render(full_page()) == report.render(full_page())


def test_plots_take_values_that_are_not_finite() -> None:
    curve = report.curves("c", {"a": [(0, 1.0), (1, float("nan")), (2, 3.0)]}, x_label="x", y_label="y")
    nothing = report.curves("empty", {"a": []}, x_label="x", y_label="y")
    assert all("<svg" in plot.svg for plot in (curve, nothing))


def test_a_section_comes_last_with_sentences_and_headings_of_its_own() -> None:
    page = full_page()
    section = Section(
        title="What s says",
        text=["It stretches.", "A & B"],
        tables=[Table(title="Hubs", columns=["by", "skewness"], rows=[["plain", "1.0"]])],
        plots=page.plots,
        grids=page.grids,
    )
    html = report.render(replace(page, sections=[section]))
    tags = Tags(html)
    assert tags.open == [] and len(tags.named("h2")) == 5 and len(tags.named("h3")) == 4
    assert html.index("<h2>Neighbours</h2>") < html.index(">What s says</h2>") < html.index("<h3>Hubs</h3>")
    assert "<p>It stretches.</p>" in html and "<p>A &amp; B</p>" in html


def test_distributions_and_ellipses_are_drawn_with_their_names() -> None:
    both = {"near": np.linspace(0, 1, 50), "far": [0.5, 0.5]}
    shares = report.histogram("h", both, x_label="cosine", line_at=1)
    shape = report.ellipse(
        "e",
        {"stays": [(0.1, 0.2)], "goes out": [(1.0, -1.0), (0.5, 0.5)]},
        circle=("same plain", 1.0),
        semi_axes=("same adaptive", (0.8, 1.3)),
        x_label="axis 3",
        y_label="axis 7",
    )
    for name in ("near", "far", "cosine", "per cent"):
        assert f">{name}</text>" in shares.svg
    for name in ("stays", "goes out", "same plain", "same adaptive", "query", "axis 3", "axis 7"):
        assert f">{name}</text>" in shape.svg


@pytest.mark.parametrize(
    "groups", [(), ("stays among the 10",), ("stays among the 10", "comes in", "goes out")]
)
def test_an_ellipse_has_room_whatever_groups_there_are(groups: tuple[str, ...]) -> None:
    plot = report.ellipse(
        "e",
        {name: [(0.0, 0.0)] for name in groups},
        circle=("same plain distance", 0.0),
        semi_axes=("same adaptive distance", (0.0, 0.0)),
        x_label="axis 3",
        y_label="axis 7",
    )
    assert all(f">{name}</text>" in plot.svg for name in groups)


@pytest.mark.parametrize("values", [{}, {"nothing": []}, {"constant": [1.0, 1.0]}])
def test_a_distribution_of_nothing_and_of_one_value_is_drawn(values: dict[str, list[float]]) -> None:
    assert "<svg" in report.histogram("h", values, x_label="x").svg


def test_a_crooked_table_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"table 'Models': 1 cells in \('a',\); expected 2"):
        Table(title="Models", columns=["model", "R@1"], rows=[["a"]])


def test_a_column_with_a_sentence_is_set_as_words() -> None:
    why = "compares every vector with every query, which is exact"
    table = Table(
        title="Why", columns=["index", "MB", "why"], rows=[["Flat", "1.3", why], ["SQ8", "0.3", "chosen"]]
    )
    assert table.wordy_columns == {2}
    page = report.render(ReportPage(title="t", summary=[], tables=[table]))
    assert page.count('<td class="words">') == 2 and '<th scope="col" class="words">why</th>' in page


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_without_a_sideways_scroll(width: int, chromium: str, tmp_path: Path) -> None:
    """Its own measurement, on a phone and on a desk: the page is no wider than the window."""
    from playwright.sync_api import sync_playwright

    path = tmp_path / "report.html"
    path.write_text(report.render(full_page()))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(path.as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth")
        loaded = page.evaluate("[...document.images].every(i => (i.loading = 'eager', true))")
        page.wait_for_function(
            "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        )
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="dark")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.close()
    assert wide <= width and loaded and light != dark and complaints == []
