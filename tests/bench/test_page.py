"""The page of plots, in a real browser."""

import shutil
from pathlib import Path
from random import Random

import pytest
from playwright.sync_api import sync_playwright

from lorry.bench.device import Reading
from lorry.bench.figures import figures_of
from lorry.bench.page import page_of
from lorry.bench.records import Record
from lorry.bench.totals import Facts, Totals, totals_of
from lorry.bench.workload import Tenant, Train, Workload

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WORKLOAD = Workload("<b>bold</b> & bad", "m", [Tenant("a", [Train()])], warm_up_s=2, duration_s=20)
FACTS = Facts("</script><script>window.hurt = 1</script>", "a machine", 2, "3.11", {}, None, "2026-01-01")
READINGS = [Reading(5.0 * i, 2.0 * i, 1.0 * i, 1) for i in range(5)]


def some_records() -> list[Record]:
    random = Random(1)
    found = list[Record]()
    for i in range(300):
        due_s, latency_s = i * 0.07, random.gammavariate(2, 0.2)
        kind, error = random.choice(["train", "sample"]), "Refused" if i % 50 == 0 else None
        tenant = random.choice(["alice", "bob", "</script><script>window.hurt = 2</script>"])
        token_s = [due_s + latency_s / 2, due_s + latency_s] if kind == "sample" else []
        tokens = random.randint(1, 99)
        found.append(Record(tenant, kind, i, due_s, due_s, due_s + latency_s, tokens, token_s=token_s, error=error))
    return found


def written(folder: Path) -> Path:
    records = some_records()
    totals: Totals = totals_of(FACTS, WORKLOAD, [figures_of(WORKLOAD, records, READINGS)])
    page = folder / "page.html"
    page.write_text(page_of(totals, records, READINGS), encoding="utf-8")
    return page


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_a_browser_draws_every_plot_and_fetches_nothing(tmp_path: Path) -> None:
    page_file = written(tmp_path)
    said, fetched = list[str](), list[str]()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1200})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_selector(".barlayer .trace", state="attached")
        assert page.locator(".subplot").count() == 8
        assert page.locator(".annotation-text").count() == 8
        assert page.locator(".scatterlayer .trace").count() == 8
        assert page.locator(".barlayer .trace").count() == 10
        assert page.locator("h1").inner_text() == f"{WORKLOAD.name} at {FACTS.server}"
        assert "<script>window.hurt = 2</script>" in "".join(page.locator(".x4tick").all_text_contents())
        assert page.evaluate("window.hurt") is None
        assert page.title().startswith("<b>bold</b> & bad at </script>")
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert fetched == [page_file.as_uri()]
    assert said == []
