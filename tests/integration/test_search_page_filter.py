"""The filter of the search page in a real browser: made by hand, kept in the address, told when wrong."""

import json
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from namr.search.answers import SearchOptions
from namr.search.searcher import Searcher
from namr.serve.app import create_app
from namr.store import tables
from namr.store.cache import Cache
from tests import small_release
from tests.running import running

pytestmark = pytest.mark.browser

BRANDS = ("acme", "blue & sons", "Größe", None)


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """Digits with fields of every kind."""
    root = tmp_path_factory.mktemp("filtered")
    small_release.publish(root, small_release.Recipe())
    plain = Searcher.open(str(root / "releases"), cache=Cache(root / "cache", 10**9), num_threads=1)
    table = small_release.table_of(plain.release)
    fields = [
        tables.fields_text(
            {
                "row": row,
                "brand": BRANDS[row % 4],
                "sold": row % 2 == 0,
                "note": "<b>" if row % 2 else row,
                "day": f"2026-05-{row % 28 + 1:02}",
            }
        )
        for row in range(len(table))
    ]
    return small_release.with_items(plain, small_release.as_items(replace(table, fields=fields)))


@pytest.fixture(scope="module")
def url(searcher: Searcher) -> Iterator[str]:
    with running(create_app(searcher)) as address:
        yield address


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, url: str, searcher: Searcher) -> Iterator[Page]:
    """The neighbours of one item; at the end nothing may have gone wrong in the page."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(address(url, searcher))
    expect(opened.locator("#plain .card")).to_have_count(12)
    yield opened
    context.close()
    assert complaints == []


def address(url: str, searcher: Searcher, wanted: object = None) -> str:
    item = searcher.items.by_key("digit/33")
    assert item is not None
    more = "" if wanted is None else f"&filter={urllib.parse.quote(json.dumps(wanted))}"
    return f"{url}/#id={item.id}{more}"


def add(page: Page, name: str) -> None:
    """Opens the form for a condition by one field."""
    page.get_by_role("button", name="Add a filter").click()
    page.locator("#field").select_option(name)


def expect_answer(page: Page, searcher: Searcher, wanted: dict[str, Any] | None) -> None:
    """The page shows what the searcher finds with this filter."""
    options = SearchOptions(k=12, side="none", filter=wanted)
    (answer,) = searcher.search(keys=["digit/33"], options=options)
    expect(page.locator("#plain .key")).to_have_text([hit.key for hit in answer.hits])
    shown = page.evaluate("new URLSearchParams(location.hash.slice(1)).get('filter')")
    assert json.loads(shown or "null") == wanted


def test_conditions_of_every_kind_are_made_by_hand_and_hold_together(page: Page, searcher: Searcher) -> None:
    wanted: dict[str, Any] = {}
    add(page, "label")
    page.locator("#values").get_by_label(re.compile("^3, ")).check()
    page.locator("#value").fill("8")
    page.keyboard.press("Enter")
    page.locator("#values").get_by_label("no value").check()
    page.get_by_role("button", name="Apply").click()
    label = page.locator(".chip").first
    expect(label).to_contain_text("label: 3, 8 or no value")
    wanted["label"] = {"in": ["3", "8", None]}
    expect_answer(page, searcher, wanted)

    add(page, "row")
    page.locator("#min").fill("10")
    page.locator("#max").fill("99.5")
    page.keyboard.press("Enter")
    expect(page.locator(".chip").nth(1)).to_contain_text("row: 10 to 99.5")
    wanted["row"] = {"min": 10, "max": 99.5}
    expect_answer(page, searcher, wanted)

    add(page, "sold")
    page.locator("#values").get_by_label("true").check()
    page.get_by_role("button", name="Apply").click()
    wanted["sold"] = {"in": [True]}
    expect_answer(page, searcher, wanted)

    add(page, "day")
    page.locator("#how").select_option("is in a range")
    page.locator("#max").fill("2026-05-20")
    page.get_by_role("button", name="Apply").click()
    wanted["day"] = {"max": "2026-05-20"}
    expect_answer(page, searcher, wanted)
    assert page.locator("#field option[value=note]").is_disabled()

    page.get_by_role("button", name="Remove the filter row").click()
    del wanted["row"]
    expect_answer(page, searcher, wanted)
    page.get_by_role("button", name="Clear all").click()
    expect(page.locator(".chip")).to_have_count(0)
    expect_answer(page, searcher, None)


def test_the_filter_is_in_the_address_and_goes_where_it_goes(
    page: Page, searcher: Searcher, url: str
) -> None:
    wanted = {"brand": {"in": ["blue & sons", "Größe"]}}
    add(page, "brand")
    page.locator("#values").get_by_label("blue").check()
    page.locator("#values").get_by_label("größe").check()
    page.get_by_role("button", name="Apply").click()
    expect_answer(page, searcher, json.loads(json.dumps(wanted)))
    page.locator("#plain .card").first.click()
    expect(page.locator("#about")).not_to_contain_text("digit/33")
    expect(page.locator(".chip")).to_contain_text("brand: blue & sons or Größe")
    page.reload()
    expect(page.locator(".chip")).to_contain_text("brand: blue & sons or Größe")
    page.go_back()
    expect_answer(page, searcher, wanted)
    page.go_back()
    expect(page.locator(".chip")).to_have_count(0)
    expect_answer(page, searcher, None)
    page.go_forward()
    expect_answer(page, searcher, wanted)
    page.goto(address(url, searcher, {"row": 5, "brand": None}))
    page.reload()
    expect(page.locator(".chip")).to_contain_text(["row: 5", "brand: no value"])
    page.get_by_role("button", name="Change the filter brand").click()
    expect(page.locator("#values").get_by_label("no value")).to_be_checked()


def test_going_back_ends_a_search_that_is_still_under_way(page: Page, searcher: Searcher, url: str) -> None:
    late = re.compile(r"/items/50$")
    page.route(late, lambda _: None)  # never answered
    with page.expect_request(late):
        page.goto(address(url, searcher, {"row": 5}).replace("id=33", "id=50"))
    with page.expect_event("requestfailed", lambda request: bool(late.search(request.url)), timeout=5000):
        page.go_back()
    expect(page.locator("#about")).to_contain_text("digit/33")
    expect_answer(page, searcher, None)


def test_what_is_wrong_with_a_filter_is_said_at_the_filter(page: Page, searcher: Searcher, url: str) -> None:
    problem = page.locator("#filter-problem")
    page.goto(address(url, searcher, {"brnd": "acme"}))
    expect(problem).to_contain_text("no item of this release has a field 'brnd': perhaps you meant 'brand'")
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#results")).to_be_hidden()
    page.get_by_role("button", name="Remove the filter brnd").click()
    expect(problem).to_be_hidden()
    expect(page.locator("#plain .card")).to_have_count(12)
    page.goto(f"{address(url, searcher)}&filter=%7Bno")
    expect(problem).to_contain_text("can't be read")
    add(page, "row")
    page.get_by_role("button", name="Apply").click()
    expect(problem).to_contain_text("one end of the range or both")
    page.locator("#min").fill("ten")
    page.get_by_role("button", name="Apply").click()
    expect(problem).to_contain_text("“ten” is no number")
    page.locator("#min").fill("9007199254740993")
    page.get_by_role("button", name="Apply").click()
    expect(problem).to_contain_text("can't tell whole numbers")
    page.locator("#field").select_option("brand")
    page.locator("#value").fill("nosuch")
    page.get_by_role("button", name="Apply").click()
    expect(problem).to_contain_text("No image has brand “nosuch”")


def test_a_filter_that_lets_few_or_nothing_through_says_so(page: Page, searcher: Searcher, url: str) -> None:
    page.goto(address(url, searcher, {"row": -1}))
    expect(page.locator("#filter-note")).to_have_text("No other images pass this filter.")
    expect(page.locator("#plain")).to_have_text("Nothing was found.")
    page.goto(address(url, searcher, {"row": {"min": 33, "max": 35}}))
    expect(page.locator("#filter-note")).to_have_text("2 other images pass this filter.")
    page.get_by_role("button", name="Remove the filter row").click()
    expect(page.locator("#filter-note")).to_be_hidden()


def expect_gallery(page: Page, rows: set[int], *, num: int) -> None:
    """So many items are shown to begin with, all of these rows."""
    expect(page.locator("#items .card")).to_have_count(num)
    shown = page.locator("#items .key").all_text_contents()
    assert {int(key.removeprefix("digit/")) for key in shown} <= rows


def test_the_gallery_shows_what_passes_the_filter(page: Page, searcher: Searcher, url: str) -> None:
    everything = {item.fields["row"] for item in searcher.items}
    expect_gallery(page, everything, num=20)
    add(page, "row")
    page.locator("#max").fill("3")
    page.keyboard.press("Enter")
    expect_gallery(page, set(range(4)), num=4)
    page.locator("#others").click()
    expect_gallery(page, set(range(4)), num=4)
    page.go_back()
    expect_gallery(page, everything, num=20)
    page.goto(address(url, searcher, {"row": {"max": 45}, "sold": True}))
    page.reload()
    expect_gallery(page, set(range(0, 46, 2)), num=20)
    page.goto(address(url, searcher, {"row": -1}))
    expect(page.locator("#items")).to_have_text("No image of the gallery passes this filter.")
    page.goto(f"{url}/#filter={urllib.parse.quote(json.dumps({'brnd': 'acme'}))}")
    expect(page.locator("#filter-problem")).to_contain_text("perhaps you meant 'brand'")
    expect(page.locator("#items")).to_have_text("")
    expect(page.locator("#problem")).to_be_hidden()
    page.get_by_role("button", name="Remove the filter brnd").click()
    expect_gallery(page, everything, num=20)


def test_of_two_draws_the_one_that_began_last_is_shown(page: Page, searcher: Searcher, url: str) -> None:
    late = re.compile(r"/items\?.*filter=")
    page.route(late, lambda _: None)  # never answered
    with page.expect_request(late):
        page.goto(address(url, searcher, {"row": {"max": 3}}))
    with page.expect_event("requestfailed", lambda request: bool(late.search(request.url)), timeout=5000):
        page.go_back()
    expect_gallery(page, {item.fields["row"] for item in searcher.items}, num=20)


def test_the_filter_is_made_and_removed_by_keyboard(page: Page, searcher: Searcher) -> None:
    focused = "document.activeElement.id || document.activeElement.ariaLabel"
    page.locator("#exact").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "field"
    page.keyboard.press("Escape")
    expect(page.locator("#condition")).to_be_hidden()
    assert page.evaluate(focused) == "add-condition"
    page.keyboard.press("Enter")
    page.keyboard.press("b")
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate(focused) == "value"
    page.keyboard.type("ac")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "add-condition"
    expect_answer(page, searcher, {"brand": {"in": ["acme"]}})
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focused) == "Remove the filter brand: acme"
    page.keyboard.press("Enter")
    expect_answer(page, searcher, None)


def test_names_and_values_are_text_and_the_form_fits_a_narrow_screen(
    browser: Browser, url: str, searcher: Searcher
) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page = context.new_page()
    markup, long = "<img src=x onerror='window.broken = true'>", "W" * 300
    page.goto(address(url, searcher, {"brand": {"in": [markup, long, "a", "b"]}, "row": {"min": 1}}))
    expect(page.locator(".chip")).to_have_count(2)
    page.get_by_role("button", name="Change the filter brand").click()
    expect(page.get_by_text(markup, exact=True)).to_be_visible()
    assert page.evaluate("window.broken") is None
    for name in ("brand", "row", "label"):
        page.locator("#field").select_option(name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
    context.close()
