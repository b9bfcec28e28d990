"""The page of `patchssl report` in headless Chromium: it sorts, filters and opens, and nothing complains."""

import dataclasses
import shutil

import numpy as np
import pytest
from made_results import made_up_records, make_results
from PIL import Image

from patchssl.report.page.make import make_report

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, tiny_run):
    """A page of 40 records, one run and six images."""
    root = tmp_path_factory.mktemp("report")
    results, images = make_results(root, num_images=6)
    odd = dataclasses.replace(next(made_up_records(1)), model="a & b 'quoted' \"twice\"", weights_sha256="e" * 64)
    odd.write(results)
    return make_report(root / "out", results=results, runs=[tiny_run], data=[images]).path


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Debian's package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM,
                                     args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser, page_file):
    """A function that opens the page; at the end there must have been no message, no error and no request."""
    said, contexts = [], []

    def opened(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url)
                if not request.url.startswith(("data:", page_file.as_uri())) else None)
        page.goto(page_file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def column(page, number):
    return page.locator(f"#all-records tbody tr:visible > :nth-child({number})").all_text_contents()


def test_headings_sort_numbers_as_numbers_and_words_as_words(open_page):
    page = open_page()
    heading = page.locator("#all-records th", has_text="%")
    before = column(page, 2)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(page, 2) == sorted(before, key=float, reverse=True) != before
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(page, 2) == sorted(before, key=float)
    page.locator("#all-records th", has_text="Data set").locator("button").press("Space")
    assert heading.get_attribute("aria-sort") == "none"
    assert column(page, 5) == sorted(column(page, 5))


def test_cells_without_a_number_come_last_whatever_the_order(open_page):
    page = open_page()
    table = page.locator("table", has_text="not run").first
    place = table.evaluate("t => [...t.rows[0].cells].findIndex((_, i) => [...t.tBodies[0].rows].some("
                           "r => r.cells[i].textContent === 'not run'))")
    for _ in range(2):
        table.locator("th button").nth(place).click()
        keys = table.evaluate("(t, i) => [...t.tBodies[0].rows].map(r => r.cells[i].dataset.key ?? '')", place)
        numbers = [key for key in keys if key]
        assert keys == numbers + [""] * (len(keys) - len(numbers)) and 0 < len(numbers) < len(keys)


def test_the_filter_keeps_rows_with_every_word_and_counts_them(open_page):
    page = open_page()
    total = len(column(page, 1))
    page.get_by_label("Filter the rows of All records").fill("NETWORK-1 linear")
    rows = page.locator("#all-records tbody tr:visible")
    assert rows.count() == 8
    assert all("network-1" in text and "linear" in text for text in rows.all_text_contents())
    assert page.locator('[data-count="all-records"]').inner_text() == f"8 of {total}"
    page.get_by_label("Filter the rows of All records").fill("'quoted'")
    assert column(page, 1) == ["a & b 'quoted' \"twice\""]
    page.get_by_label("Filter the rows of All records").fill("")
    assert len(column(page, 1)) == total


def test_a_query_opens_by_keyboard_and_shows_its_pictures(open_page):
    page = open_page()
    query = page.locator("details.query").first
    assert query.locator("img[src]").count() == 0
    query.locator("summary").focus()
    page.keyboard.press("Enter")
    assert query.get_attribute("open") is not None
    images = query.locator("img")
    assert images.count() == 15  # the query, ten results, four late positives
    page.wait_for_function("d => [...d.querySelectorAll('img')].every(i => i.naturalWidth > 0)",
                           arg=query.element_handle())
    assert set(query.locator(".shot").first.get_attribute("class").split()) == {"shot", "asked"}
    for shot in query.locator(".shot:not(.asked)").all():
        role = shot.get_attribute("class").removeprefix("shot ")
        assert role in shot.locator(".role").inner_text()  # not by its color alone
        assert shot.evaluate("s => getComputedStyle(s).borderStyle") == {
            "positive": "solid", "junk": "dashed", "error": "double", "distractor": "dotted"}[role]


def test_galleries_are_filtered_by_their_titles(open_page):
    page = open_page()
    field = page.get_by_label("Filter by network, data set or protocol")
    blocks = page.locator("#gallery-list > details:visible")
    total = blocks.count()
    field.fill("network-1 rparis6k")
    assert blocks.count() == 1 and "network-1" in blocks.inner_text()
    assert page.locator('[data-count="gallery-list"]').inner_text() == f"1 of {total}"


def test_the_first_tab_leads_past_the_navigation(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_system_chooses_the_colors_and_the_button_overrules_it(open_page, scheme):
    page = open_page(color_scheme=scheme)

    def brightness():
        return sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")))

    dark = scheme == "dark"
    assert (brightness() < 200) == dark
    button = page.locator("#theme")
    for name, expected in (("light", False), ("dark", True), ("as the system", dark)):
        button.click()
        assert button.inner_text() == f"Colors: {name}"
        assert (brightness() < 200) == expected


def test_a_phone_shows_rows_as_blocks_with_the_names_of_their_columns(open_page):
    page = open_page(390, 844)
    cell = page.locator("table.stacked tbody td.num").first
    label = cell.evaluate("c => getComputedStyle(c, '::before').content")
    heading = page.locator("table.stacked").first.locator("thead th").nth(3).inner_text()
    assert label.strip('"') == cell.get_attribute("data-label") == heading.strip()
    box = cell.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390  # no number hides at the right
    assert "content" not in open_page().locator("table.stacked td").first.evaluate(
        "c => getComputedStyle(c, '::before').content === 'none' ? '' : 'content'")


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing_that_shuts_somebody_out(open_page, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(width, 900, color_scheme=scheme)
    page.locator("details.query:visible summary").first.click()
    found = Axe().run(page)
    assert len(found.response["passes"]) > 30
    assert found.response["violations"] == []


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_no_width_makes_the_page_scroll_sideways(open_page, width, tmp_path):
    page = open_page(width, 800)
    for query in page.locator("details.query:visible").all()[:2]:
        query.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shot = tmp_path / "page.png"
    page.screenshot(path=shot)
    with Image.open(shot) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 20  # something is on it
