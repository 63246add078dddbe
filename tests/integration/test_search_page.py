"""The search page in a real browser, against a real service with real pictures."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.serve.app import create_app
from namr.serve.limits import Limits
from namr.store.cache import Cache
from tests import small_release
from tests.running import running

pytestmark = pytest.mark.browser

NASTY = '<img src=x onerror="window.broken = true">'


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    root = tmp_path_factory.mktemp("page")
    folder = small_release.publish_with_model(root)
    cache = Cache(root / "cache", 10**9)
    return Searcher.open(str(root / "releases"), cache=cache, model_folder=folder, num_threads=1)


@pytest.fixture(scope="module")
def url(searcher: Searcher) -> Iterator[str]:
    with running(create_app(searcher, limits=Limits(max_upload_bytes=1 << 20))) as address:
        yield address


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        launched = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The page, opened; at the end nothing may have gone wrong in it, and no other host been asked."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "request", lambda request: request.url.startswith((url, "blob:")) or complaints.append(request.url)
    )
    opened.goto(url)
    expect(opened.locator("#items .card")).to_have_count(20)
    yield opened
    context.close()
    assert complaints == []


def keys(page: Page, name: str) -> list[str]:
    return page.locator(f"#{name} .key").all_text_contents()


def picture(tmp_path: Path, number: int) -> Path:
    path = tmp_path / f"digit-{number}.png"
    path.write_bytes(small_release.digit(number))
    return path


def test_an_uploaded_picture_shows_its_neighbours_side_by_side(
    page: Page, searcher: Searcher, tmp_path: Path
) -> None:
    page.locator("#file").set_input_files(picture(tmp_path, 17))
    expect(page.locator("#plain .card")).to_have_count(12)
    expect(page.locator("#adaptive .card")).to_have_count(12)
    for name, side in (("plain", "none"), ("adaptive", "both")):
        answer = searcher.search(
            images=[small_release.digit(17)], options=SearchOptions(k=12, side=side, depth=50)
        )[0]
        assert keys(page, name) == [hit.key for hit in answer.hits]
        distances = page.locator(f"#{name} .distance").all_text_contents()
        assert distances == [f"{hit.distance:.3f}" for hit in answer.hits]
        expect(page.locator(f"#{name}-time")).to_have_text(re.compile(r"^[\d.]+ ms$"))
        expect(page.locator(f"#{name}-badge")).to_have_text(answer.certainty)
    expect(page.locator("#about")).to_contain_text("digit-17.png")
    expect(page.locator("#preview")).to_be_visible()
    shown = page.locator("#plain img").first
    expect(shown).to_have_js_property("complete", True)
    assert shown.evaluate("image => image.naturalWidth") == 32


def test_what_moved_is_marked(page: Page, searcher: Searcher) -> None:
    page.goto(f"{page.url}#id={searcher.items.by_key('digit/33').id}")
    page.reload()
    expect(page.locator("#adaptive .card")).to_have_count(12)
    before, after = keys(page, "plain"), keys(page, "adaptive")
    for rank, key in enumerate(after):
        if key not in before:
            wanted = ["new"]
        elif (steps := before.index(key) - rank) == 0:
            wanted = []
        else:
            wanted = [f"{'▲' if steps > 0 else '▼'} {abs(steps)}"]
        assert page.locator("#adaptive .card").nth(rank).locator(".moved").all_text_contents() == wanted
    assert page.locator("#plain .moved").count() == 0


def test_a_click_on_a_neighbour_searches_on_and_back_goes_back(page: Page) -> None:
    first = page.locator("#items .card").first
    key = first.locator(".key").text_content()
    first.click()
    expect(page.locator("#about")).to_contain_text(f"{key}From the gallery")
    expect(page.locator("#plain .card")).to_have_count(12)
    assert key not in keys(page, "plain")
    neighbour = keys(page, "plain")[2]
    page.locator("#plain .card").nth(2).click()
    expect(page.locator("#about")).to_contain_text(f"{neighbour}From the gallery")
    page.go_back()
    expect(page.locator("#about")).to_contain_text(f"{key}From the gallery")


def test_controls_change_the_answer(page: Page, searcher: Searcher) -> None:
    page.goto(f"{page.url}#id={searcher.items.by_key('digit/33').id}")
    page.reload()
    expect(page.locator("#plain .card")).to_have_count(12)
    page.locator("#k").fill("5")
    page.locator("#k").press("Enter")
    expect(page.locator("#plain .card")).to_have_count(5)
    page.locator("#side").select_option("query")
    page.locator("#deepen").check()
    expect(page.locator("#depth")).to_be_disabled()
    answer = searcher.search(keys=["digit/33"], options=SearchOptions(k=5, side="query", depth="adaptive"))[0]
    expect(page.locator("#adaptive-badge")).to_have_text(answer.certainty)
    expect(page.locator("#adaptive-badge")).to_have_attribute(
        "title", re.compile(f"Nearest of {answer.depth} candidates")
    )
    page.locator("#deepen").uncheck()
    expect(page.locator("#depth")).to_be_enabled()
    page.locator("#exact").check()
    expect(page.locator("#depth")).to_be_disabled()
    expect(page.locator("#adaptive-badge")).to_have_text("proved")
    answer = searcher.search(keys=["digit/33"], options=SearchOptions(k=5, side="query", exact=True))[0]
    expect(page.locator("#adaptive .key")).to_have_text([hit.key for hit in answer.hits])


def hash_of(page: Page) -> dict[str, str]:
    """What the address says, its item left out."""
    return {
        name: value
        for name, value in page.evaluate("[...new URLSearchParams(location.hash.slice(1))]")
        if name != "id"
    }


def expect_controls(page: Page, **wanted: str | bool) -> None:
    """k, side and depth as text; deepen and exact as flags; those not named as the release has them."""
    usual: dict[str, str | bool] = {"k": "12", "side": "both", "depth": "50", "deepen": False, "exact": False}
    for name, value in (usual | wanted).items():
        shown = page.locator(f"#{name}")
        if isinstance(value, str):
            expect(shown).to_have_value(value)
        else:
            expect(shown).to_be_checked(checked=value)
    shown = page.evaluate("['deepen', 'depth'].map((id) => document.getElementById(id).disabled)")
    exact, deepen = wanted.get("exact", False), wanted.get("deepen", False)
    assert shown == [exact, bool(exact or deepen)]


def test_a_link_shows_the_answer_that_it_was_made_of_and_going_back_the_one_before(
    page: Page, browser: Browser, searcher: Searcher
) -> None:
    page.goto(f"{page.url}#id={searcher.items.by_key('digit/33').id}")
    expect(page.locator("#plain .card")).to_have_count(12)
    assert hash_of(page) == {}
    made: list[tuple[dict[str, str], dict[str, str | bool], SearchOptions]] = [
        ({"k": "5"}, {"k": "5"}, SearchOptions(k=5, depth=50)),
        (
            {"k": "5", "side": "query"},
            {"k": "5", "side": "query"},
            SearchOptions(k=5, depth=50, side="query"),
        ),
        (
            {"k": "5", "side": "query", "depth": "7"},
            {"k": "5", "side": "query", "depth": "7"},
            SearchOptions(k=5, depth=7, side="query"),
        ),
        (
            {"k": "5", "side": "query", "depth": "adaptive"},
            {"k": "5", "side": "query", "deepen": True},
            SearchOptions(k=5, depth="adaptive", side="query"),
        ),
        (
            {"k": "5", "side": "query", "depth": "adaptive", "exact": "true"},
            {"k": "5", "side": "query", "deepen": True, "exact": True},
            SearchOptions(k=5, exact=True, side="query"),
        ),
    ]

    def expect_answer(of: Page, options: SearchOptions) -> None:
        (answer,) = searcher.search(keys=["digit/33"], options=options)
        expect(of.locator("#adaptive .key")).to_have_text([hit.key for hit in answer.hits])
        expect(of.locator("#adaptive-badge")).to_have_attribute(
            "title", re.compile(f"Nearest of {answer.depth} candidates")
        )

    changes = [
        lambda: (page.locator("#k").fill("5"), page.locator("#k").press("Enter")),
        lambda: page.locator("#side").select_option("query"),
        lambda: (page.locator("#depth").fill("7"), page.locator("#depth").press("Enter")),
        lambda: page.locator("#deepen").check(),
        lambda: page.locator("#exact").check(),
    ]
    for change, (said, controls, options) in zip(changes, made, strict=True):
        change()
        expect_answer(page, options)
        assert hash_of(page) == said
        context = browser.new_context()
        receiver = context.new_page()
        receiver.goto(page.url)
        expect_answer(receiver, options)
        expect_controls(receiver, **controls)
        context.close()
    for said, controls, options in reversed(made[:-1]):
        page.go_back()
        expect_answer(page, options)
        assert hash_of(page) == said
        expect_controls(page, **controls)
    page.go_back()
    expect_answer(page, SearchOptions(k=12, depth=50))
    expect_controls(page)
    page.go_forward()
    expect_answer(page, made[0][2])
    page.locator("#plain .card").first.click()
    expect(page.locator("#about")).not_to_contain_text("digit/33")
    assert hash_of(page) == {"k": "5"}
    page.locator("#k").fill("12")
    page.locator("#k").press("Enter")
    expect(page.locator("#plain .card")).to_have_count(12)
    assert hash_of(page) == {}


def test_settings_of_an_address_that_can_not_be_are_said_and_left_out(page: Page, searcher: Searcher) -> None:
    problem, url = page.locator("#controls-problem"), page.url
    item = searcher.items.by_key("digit/33").id
    wrong = {"k": "0", "side": "none", "depth": "-3", "exact": "perhaps"}
    for name, value in wrong.items():
        page.goto(f"{url}#id={item}&{name}={value}")
        expect(problem).to_have_text(
            f"This address asks for {name} “{value}”, which can't be: it is left at its default."
        )
        expect(page.locator("#plain .card")).to_have_count(12)
        expect_controls(page)
    page.goto(f"{url}#id={item}&k=1e1&side=query&depth=10001&exact={'<b>' * 30}")
    expect(problem).to_contain_text("asks for k “1e1”, depth “10001”, exact “<b><b><b>")
    expect(problem).to_contain_text("they are left at their defaults")
    expect_controls(page, side="query")
    page.locator("#k").fill("5")
    page.locator("#k").press("Enter")
    expect(problem).to_be_hidden()
    expect(page.locator("#plain .card")).to_have_count(5)
    assert hash_of(page) == {"k": "5", "side": "query"}
    page.goto(f"{url}#id={item}&k=007&side=both&exact=false&depth=50")
    expect(problem).to_be_hidden()
    expect(page.locator("#plain .card")).to_have_count(7)
    expect_controls(page, k="7")


def test_what_is_a_default_of_the_release_that_came_meanwhile_is_left_out_and_nothing_else(
    page: Page, url: str
) -> None:
    def of_the_next(route: Route) -> None:
        reply = route.fetch()
        body = {**reply.json(), "release_id": "next"}
        route.fulfill(response=reply, json={**body, "depth": 70} if route.request.method == "GET" else body)

    page.route(re.compile(f"^{re.escape(url)}/(release|search/key)$"), of_the_next)
    page.locator("#items .card").first.click()
    expect(page.locator("#release")).to_contain_text("next")
    expect(page.locator("#plain .card")).to_have_count(12)
    assert hash_of(page) == {"depth": "50"}  # which the answer was made with
    expect_controls(page)
    page.locator("#depth").fill("70")
    page.locator("#depth").press("Enter")
    expect(page.locator("#adaptive-badge")).to_have_attribute("title", re.compile("Nearest of 70 cand"))
    assert hash_of(page) == {}


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    reached = []
    for _ in range(10):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    controls = ["k", "side", "depth", "deepen", "exact", "add-condition", "others"]
    assert reached == ["", "file", *controls, "card"]
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.endswith("Search with this image")
    page.keyboard.press("Enter")
    expect(page.locator("#plain .card")).to_have_count(12)


def test_other_items_are_shown_on_request(page: Page) -> None:
    before = keys(page, "items")
    page.locator("#others").click()
    expect(page.locator("#items .key").first).not_to_have_text(before[0])
    assert len(keys(page, "items")) == 20


def test_what_went_wrong_is_said(page: Page, tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    page.locator("#file").set_input_files(text)
    expect(page.locator("#problem")).to_contain_text("image refused: not an image")
    expect(page.locator("#results")).to_be_hidden()
    large = tmp_path / "large.png"
    large.write_bytes(b"\0" * (8 << 20))
    page.locator("#file").set_input_files(large)
    expect(page.locator("#problem")).to_contain_text("larger than 1 MB")
    page.locator("#file").set_input_files(picture(tmp_path, 3))
    expect(page.locator("#plain .card")).to_have_count(12)
    expect(page.locator("#problem")).to_be_hidden()


def test_a_service_that_went_away_is_said(page: Page, url: str) -> None:
    page.route(f"{url}/search/**", lambda route: route.abort())
    page.locator("#items .card").first.click()
    expect(page.locator("#problem")).to_contain_text("The service doesn't answer")


def test_a_dropped_picture_is_searched(page: Page) -> None:
    page.evaluate(
        """async (bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            document.querySelector("#drop").dispatchEvent(
                new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        list(small_release.digit(8)),
    )
    expect(page.locator("#about")).to_contain_text("dropped.png")
    expect(page.locator("#plain .key").first).to_have_text("digit/8")


def test_keys_and_labels_are_text_and_never_markup(browser: Browser, tmp_path: Path) -> None:
    small_release.publish(tmp_path, small_release.Recipe(num_shards=1))
    nasty = Searcher.open(str(tmp_path / "releases"), cache=Cache(tmp_path / "cache", 10**9))
    table = small_release.table_of(nasty.release)
    keys_of_markup = [f"{NASTY}{row}" for row in range(len(table))]
    nasty = small_release.with_items(
        nasty, small_release.as_items(replace(table, keys=keys_of_markup, labels=[NASTY] * len(table)))
    )
    context = browser.new_context()
    with running(create_app(nasty)) as url:
        page = context.new_page()
        page.goto(url)
        page.locator("#items .card").first.click()
        expect(page.locator("#plain .label")).to_have_text([NASTY] * 12)
        expect(page.locator("#plain .key").first).to_contain_text(NASTY)
        expect(page.locator("#about")).to_contain_text(NASTY)
        assert page.locator("img[src=x]").count() == 0
        assert page.evaluate("window.broken") is None
        page.locator("#file").set_input_files(picture(tmp_path, 1))
        expect(page.locator("#problem")).to_contain_text("no model")
    context.close()


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_any_screen(browser: Browser, url: str, searcher: Searcher, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(f"{url}/#id={searcher.items.by_key('digit/7').id}")
    expect(page.locator("#adaptive .card")).to_have_count(12)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
    context.close()
