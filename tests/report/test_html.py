"""Proves that report.html says what the Markdown pages say and works in a real Chromium, on the committed records."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from playwright.sync_api import Locator, Page, sync_playwright

from experiments.report.__main__ import main
from experiments.report.html import NUMBER

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "results" / "baseline"
# Playwright adds --headless and an empty --user-data-dir of its own.
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MISSING = {"", "—", "not run"}
# What a cell says, without the list of records that it may open.
TEXTS = "cells => cells.map(cell => (cell.querySelector('summary') ?? cell).textContent.trim())"
COLOURS = """elements => elements.map(element => {
  let ground = element;
  while (getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
  return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
})"""


@pytest.fixture(scope="module")
def shown(debian: Callable[..., None], committed_report: Path) -> Iterator[tuple[Page, list[str]]]:
    """The report in Chromium, and all that went wrong or was asked for from elsewhere, to be looked at in the end."""
    debian("chromium", commands=("chromium",))
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=SWITCHES)
        page = browser.new_page()
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if outside(request.url) else None)
        page.goto((committed_report / "report.html").as_uri())
        yield page, wrong
        browser.close()


def outside(url: str) -> bool:
    return not url.startswith(("file:", "data:"))


@pytest.fixture
def page(shown: tuple[Page, list[str]]) -> Page:
    """The report as it was opened."""
    loaded = shown[0]
    loaded.reload()
    assert loaded.title() == "LoRA reproduction: report"
    return loaded


@pytest.fixture(autouse=True)
def nothing_went_wrong(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "shown" in request.fixturenames:
        assert request.getfixturevalue("shown")[1] == []


def table(page: Page, section: str) -> Locator:
    """The first table under a heading, by its anchor."""
    return page.locator(f"xpath=//*[@id='{section}']/following::table[1]")


def column(found: Locator, place: int) -> list[str]:
    return found.locator(f"tbody tr > :nth-child({place})").evaluate_all(TEXTS)


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown page as they are read: without bars, bold, and formulas for grey."""
    text = re.sub(r"\$\\color\{gray\}\{(.*?)\}\$", lambda grey: grey[1].replace(r"\pm", "±"), text)
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in block.splitlines()]
        cells = [[cell.strip().replace(r"\|", "|").replace("**", "") for cell in line] for line in lines]
        found.append([cells[0], *cells[2:]])
    return found


@pytest.mark.slow
def test_it_has_every_table_of_every_markdown_page(page: Page, committed_report: Path) -> None:
    pages = sorted((committed_report / "tables").glob("*.md"))
    said = [each for path in pages for each in markdown_tables(path.read_text(encoding="utf-8"))]
    found = {path.stem: page.locator(f"section[aria-labelledby='{path.stem}'] table") for path in pages}
    shown_tables = []
    for tables in found.values():
        for place in range(tables.count()):
            rows = tables.nth(place).locator("tr").all()
            shown_tables.append([row.locator("th, td").evaluate_all(TEXTS) for row in rows])
    assert len(said) > 50 and shown_tables == said
    notes = re.findall(r"^- (.*)$", (committed_report / "tables" / "glue-local.md").read_text(encoding="utf-8"), re.M)
    items = page.locator("section[aria-labelledby='glue-local'] > ul > li").all_text_contents()
    assert len(notes) > 10 and items == notes


@pytest.mark.slow
def test_every_part_is_named_for_those_who_do_not_see_it(page: Page) -> None:
    assert page.locator("html").get_attribute("lang") == "en" and page.locator("main").count() == 1
    tables = page.locator("table").count()
    assert tables == page.locator("caption").count() == len(set(page.locator("caption").all_text_contents()))
    assert page.locator("thead th").count() == page.locator("thead th[scope=col] > button[type=button]").count()
    assert page.locator("tbody tr").count() == page.locator("tbody tr > th[scope=row]:first-child").count()
    ids = page.locator("[id]").evaluate_all("all => all.map(one => one.id)")
    targets = page.locator("a[href^='#']").evaluate_all("all => all.map(one => one.getAttribute('href').slice(1))")
    assert len(ids) == len(set(ids)) and len(targets) > 60 and set(targets) <= set(ids)


def in_order(texts: list[str], direction: int) -> bool:
    """Numbers by size, then words, then what is missing."""
    found = [NUMBER.match(text) for text in texts]
    kinds = [2 if text in MISSING else 0 if number else 1 for text, number in zip(texts, found, strict=True)]
    numbers = [float(number[1].replace(",", "")) for number in found if number]
    return kinds == sorted(kinds) and numbers == sorted(numbers, reverse=direction < 0)


@pytest.mark.slow
def test_a_click_sorts_by_number_and_leaves_what_was_not_run_last(page: Page) -> None:
    rates = table(page, "math_lr-local-rates")
    for place in range(3, 3 + 6):
        before, button = column(rates, place), rates.locator("thead button").nth(place - 1)
        for direction, words in ((1, "ascending"), (-1, "descending")):
            button.click()
            after = column(rates, place)
            assert sorted(after) == sorted(before) and in_order(after, direction)
            assert rates.locator("th[aria-sort]").count() == 1
            assert button.locator("..").get_attribute("aria-sort") == words
    assert {"not run"} < {text for place in range(3, 9) for text in column(rates, place)}
    assert column(rates, 8)[:4] == ["1.6685 (n=1)", "1.6026 (n=1)", "0.7054 (n=1)", "not run"]
    methods = ["full_ft", "lora", "lora_ga", "lora_one", "lora_pro", "rslora"]
    rates.locator("thead button").nth(0).click()
    assert column(rates, 1) == methods
    rates.locator("thead button").nth(0).click()
    assert column(rates, 1) == methods[::-1]
    parameters = table(page, "glue-local-cost")
    parameters.locator("thead button").nth(5).click()
    assert column(parameters, 6)[0] == "2,442,240" and column(parameters, 6)[-1] == "134,515,008"


@pytest.mark.slow
def test_the_keyboard_sorts_and_opens(page: Page) -> None:
    main_table = table(page, "glue-local")
    button = main_table.locator("thead button").nth(2)
    main_table.locator("thead button").nth(1).focus()
    page.keyboard.press("Tab")
    assert button.evaluate("one => one === document.activeElement && one.matches(':focus-visible')")
    assert button.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert column(main_table, 1) == ["lora", "full_ft", "lora_pro", "lora_one", "lora_ga"]
    page.keyboard.press("Space")
    assert column(main_table, 1)[0] == "lora_ga"
    cell = main_table.locator("tbody tr").first.locator("td").nth(1)
    cell.locator("summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "movies, lora_ga, 1e-4, seed 0"
    page.keyboard.press("Enter")
    page.wait_for_url("**/movies-lora_ga-seed0-*.json")
    page.go_back()


@pytest.mark.slow
def test_every_cell_of_a_main_table_leads_to_its_records(page: Page, committed_report: Path) -> None:
    linked = page.locator("main a").evaluate_all("all => all.map(one => one.getAttribute('href'))")
    files = {(committed_report / unquote(link)).resolve() for link in linked}
    records = set(BASELINE.glob("*-local/records/*.json"))
    assert len(records) > 100 and files == records
    tables = page.locator("section[aria-labelledby$='-local'] table")
    numbers = tables.filter(has_not=page.locator("caption", has_text=re.compile("^Records"))).locator("td[data-number]")
    assert numbers.count() > 1000 and numbers.filter(has_not=page.locator("a")).all_text_contents() == []
    movies = table(page, "glue-local").locator("tbody tr").first.locator("td").nth(1).locator("a")
    names = movies.evaluate_all("all => all.map(one => one.getAttribute('href').split('/').pop())")
    assert [name.rpartition("-")[0] for name in names] == [f"movies-full_ft-seed{seed}" for seed in range(3)]


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.slow
def test_light_and_dark_are_both_legible(page: Page) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        pairs = page.locator("p, a, li, h2, h3, th, td, th button, summary, figcaption, .memory").evaluate_all(COLOURS)
        for colour, ground in {tuple(pair) for pair in pairs}:
            dim, bright = sorted((luminance(colour), luminance(ground)))
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (scheme, colour, ground)  # WCAG 1.4.3
        grounds.append(page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))
        pictures = page.locator("img").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
        assert set(pictures) == {"rgb(255, 255, 255)"}
    page.emulate_media(color_scheme=None)
    assert luminance(grounds[0]) > 0.9 and luminance(grounds[1]) < 0.1


@pytest.mark.slow
def test_every_figure_is_inside_and_can_be_seen(page: Page, committed_report: Path) -> None:
    widths = page.locator("img").evaluate_all("all => all.map(one => [one.alt, one.naturalWidth, one.clientWidth])")
    figures = sorted(path.stem for path in (committed_report / "figures").glob("*.png"))
    assert len(figures) > 15 and sorted(alt.rpartition(": ")[2] for alt, _, _ in widths) == figures
    assert min(natural for _, natural, _ in widths) > 500 and min(width for _, _, width in widths) > 300
    assert (committed_report / "report.html").stat().st_size < 10_000_000


def written(bench: Any, out: str, baseline: str = "none") -> str:
    folders = {"records": "runs", "baseline": baseline, "out": out}
    assert main([f"{key}={bench.root / name}" for key, name in folders.items()]) == 0
    return (bench.root / out / "report.html").read_text(encoding="utf-8")


def test_a_second_run_gives_the_same_bytes_and_no_text_becomes_markup(bench: Any, record: Any) -> None:
    curve = [{"step": step, "loss": 2.0 / step} for step in range(1, 5)]
    bench.add(*(record("movies", "lora", seed, 0.8 + seed / 10, loss_curve=curve) for seed in range(2)))
    bench.add(record("movies", "<img src=x>&", 0, None, error="<script>no</script>", run_id="a b#c?d"))
    first = written(bench, "one")
    assert first == written(bench, "two") and str(bench.root) not in first
    assert "&lt;script&gt;no&lt;/script&gt;" in first and "<script>no" not in first
    assert "&lt;img src=x&gt;&amp;" in first and "<img src=x>" not in first
    assert 'src="data:image/png;base64,' in first
    assert 'href="../runs/toy-local/movies-%3Cimg%20src%3Dx%3E%26-seed0-a%20b%23c%3Fd-0.001.json"' in first


def test_a_difference_leads_to_both_records_and_memory_is_grey(bench: Any, record: Any) -> None:
    bench.add(record("movies", "lora", 0, 0.8), record("movies", "lora", 0, 0.7, experiment="glue", scale="paper"))
    bench.add(record("movies", "lora", 0, 0.75), baseline=True)
    text = written(bench, "out", baseline="baseline")
    difference = text[text.index("+5.00") :].partition("</details>")[0]
    assert re.findall(r'href="\.\./(runs|baseline)/', difference) == ["runs", "baseline"]
    assert '<span class="memory">88.73</span>†' in text


def test_only_the_whole_is_written_as_html(bench: Any, record: Any) -> None:
    bench.add(record("movies", "lora", 0, 0.8))
    assert not (bench.run() / "report.html").exists()
    assert main(["scale=local", f"records={bench.root / 'runs'}", f"out={bench.root / 'out'}"]) == 0
    assert (bench.root / "out" / "tables" / "toy-local.md").exists() and not list(bench.root.rglob("*.html"))
