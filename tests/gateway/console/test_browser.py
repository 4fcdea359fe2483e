"""Every page in a real browser, as a researcher and as an administrator, while two tenants train: plots move, numbers
are the API's, nothing is another tenant's, nobody is kept out who cannot see or has no mouse, and the policy holds.

What the pages looked like is kept in build/console.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Response, expect

from lorry.storage.store import Store
from lorry.wire.ids import TenantId
from tests.conftest import ROOT, Server, start_server

from .visitors import CHROMIUM, NO_CHROMIUM, chromium, sign_in, visit

KEPT = ROOT / "build/console"
WAYS = {"light": ("light", 1280), "dark": ("dark", 1280), "phone": ("light", 390)}
RESEARCHER = ("runs", "alarms", "waiting", "checkpoints", "playground", "usage", "audit")
ADMINISTRATOR = ("deployment", "tenants", "tenants/alice", "storage", "audit")

expect.set_options(timeout=3_600_000)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)


@dataclass(slots=True)
class Trainer:
    """A tenant's program, that trains until it is told to stop."""

    name: str
    key: str
    process: "subprocess.Popen[str]"
    run: str = ""
    step: int = -1

    def until(self, step: int) -> None:
        assert self.process.stdout is not None
        self.run = self.run or self.process.stdout.readline().strip()
        while self.step < step:
            line = self.process.stdout.readline()
            assert line, f"{self.name} ended"
            self.step = int(line)

    def stop(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        for line in self.process.stdout:
            self.step = int(line)
        assert self.process.wait() == 0

    def api(self, server: Server) -> httpx.Client:
        return httpx.Client(base_url=f"{server.url}/api/v1", headers={"X-API-Key": self.key}, timeout=None)


@contextmanager
def training(server: Server, name: str) -> Iterator[Trainer]:
    key = server.new_key(name)
    command = [sys.executable, "-m", "tests.gateway.console.trainer", server.address, key, name]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        try:
            yield Trainer(name, key, process)
        finally:
            process.kill()


@dataclass(slots=True)
class Seen:
    """What a browser was sent, and what it complained of."""

    bodies: dict[str, str] = field(default_factory=dict[str, str])
    complaints: list[str] = field(default_factory=list[str])
    elsewhere: list[str] = field(default_factory=list[str])

    def watch(self, page: Page, url: str) -> None:
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(url) else self.elsewhere.append(request.url))
        page.on("response", lambda response: self._keep(response))

    def _keep(self, response: Response) -> None:
        kind = response.headers.get("content-type", "")
        if response.status < 300 and not kind.startswith("text/event-stream"):
            self.bodies[response.url] = response.text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("console"), "--http", "127.0.0.1:0")
    yield server
    assert server.stop() in (0, 130)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def tenants(server: Server) -> Iterator[tuple[Trainer, Trainer]]:
    with ExitStack() as stack:
        both = [stack.enter_context(training(server, name)) for name in ("alice", "bob")]
        for trainer in both:
            trainer.until(2)
        yield both[0], both[1]


def administrator(server: Server) -> str:
    store = Store(server.data)
    try:
        return store.create_key(TenantId("boss"), time.time(), scopes=("admin",))
    finally:
        store.close()


def look_at(browser: Browser, server: Server, key: str, name: str, pages: dict[str, Callable[[Page], None]]) -> Seen:
    """Each page in each way, with what makes it ready."""
    seen = Seen()
    for way, (scheme, width) in WAYS.items():
        context = visit(browser, color_scheme=scheme, viewport={"width": width, "height": 900})
        page = context.new_page()
        seen.watch(page, server.url)
        sign_in(page, server.url, key)
        for place, ready in pages.items():
            page.goto(f"{server.url}/console/{place}")
            ready(page)
            what = re.sub("run-.*", "one", place.partition("?")[0]).replace("/", "-")
            kept = KEPT / f"{name}-{what}-{way}.png"
            page.screenshot(path=kept, full_page=True)
            check_accessible(page, f"{place} ({way})")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{place} is too wide for {way}"
        context.close()
    return seen


def check_accessible(page: Page, where: str) -> None:
    found = Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert serious == [], f"{where}: {[(each['id'], [node['html'] for node in each['nodes']][:3]) for each in serious]}"


def is_there(page: Page) -> None:
    page.locator("h1").wait_for()


def curves_drawn(page: Page) -> None:
    page.locator(".plot .uplot").nth(2).wait_for()


def test_a_researcher_walks_every_page(browser: Browser, server: Server, tenants: tuple[Trainer, Trainer]) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    alice, bob = tenants
    pages: dict[str, Callable[[Page], None]] = dict.fromkeys(RESEARCHER, is_there)
    pages |= {f"runs/{alice.run}": curves_drawn, f"compare?run={alice.run}": curves_drawn}
    seen = look_at(browser, server, alice.key, "researcher", pages)
    assert seen.complaints == []
    assert seen.elsewhere == []
    assert len(seen.bodies) > len(pages)
    for url, body in seen.bodies.items():
        for foreign in (bob.run, bob.name, bob.key):
            assert foreign not in body, url
    assert alice.run in seen.bodies[f"{server.url}/console/runs"]
    for place in ADMINISTRATOR[:-1]:
        context = visit(browser)
        page = context.new_page()
        sign_in(page, server.url, alice.key)
        refused = page.goto(f"{server.url}/console/{place}")
        assert refused is not None and refused.status == 403
        context.close()


def test_plots_move_and_their_numbers_are_the_apis(
    browser: Browser, server: Server, tenants: tuple[Trainer, Trainer]
) -> None:
    alice, bob = tenants
    context = visit(browser)
    page = context.new_page()
    sign_in(page, server.url, alice.key)
    page.get_by_role("link", name="alice").first.click()
    curves_drawn(page)
    loss = page.locator('[data-metric="training/loss:sum"]')
    for _ in range(3):
        before = loss.get_attribute("data-steps")
        expect(loss).not_to_have_attribute("data-steps", before or "")
    alice.stop()
    with alice.api(server) as api:
        points = api.get(f"training_runs/{alice.run}/metrics").json()["points"]
        told = {
            f"{point['source']}/{name}": (point["step"], value)
            for point in points
            for name, value in point["values"].items()
        }
        assert {name.partition("/")[2] for name in told} >= {"loss:sum", "grad_norm", "reward"}
        for name, (step, value) in told.items():
            assert step == alice.step
            plot = page.locator(f'[data-metric="{name}"]')
            expect(plot).to_have_attribute("data-steps", str(alice.step + 1))
            expect(plot).to_have_attribute("data-step", str(alice.step))
            assert float(plot.get_attribute("data-value") or "nan") == value
        plot = page.locator("[data-metric='loop/reward']")
        plot.get_by_text("As a table").click()
        assert plot.locator("tbody td").first.inner_text() == str(alice.step)
        assert page.get_by_role("img", name="grad_norm. ").count() == 1
        page.goto(f"{server.url}/console/runs")
        row = page.locator(f'tr[data-run="{alice.run}"]')
        assert row.locator('[data-cell="step"]').inner_text() == f"{alice.step:,}"
        day = time.strftime("%Y-%m-%dT00:00:00Z", time.gmtime(time.time() - 86_400))
        until = time.strftime("%Y-%m-%dT00:00:00Z", time.gmtime(time.time() + 86_400))
        events = api.get("billing/usage/events", params={"starting_on": day, "ending_before": until}).json()["data"]
        trained = sum(e["event_info"]["token_count"] for e in events if e["event_info"]["type"] == "training")
        page.goto(f"{server.url}/console/usage")
        assert page.locator("tfoot td").first.inner_text() == f"{trained:,}"
        checkpoints = api.get("checkpoints").json()["checkpoints"]
        page.goto(f"{server.url}/console/checkpoints")
        shown = page.locator('input[name="path"]').evaluate_all("boxes => boxes.map((box) => box.value)")
        assert shown == [each["tinker_path"] for each in checkpoints]
    bob.until(bob.step + 1)
    context.close()


def test_without_a_mouse(browser: Browser, server: Server, tenants: tuple[Trainer, Trainer]) -> None:
    alice, _ = tenants
    context = visit(browser)
    page = context.new_page()
    page.goto(f"{server.url}/console")
    page.keyboard.type(alice.key)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Sign out").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the page"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    box = page.locator('input[name="run"]').first
    box.focus()
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare?run=*")
    curves_drawn(page)
    context.close()


def test_a_playground_shows_what_a_model_held_likely(
    browser: Browser, server: Server, tenants: tuple[Trainer, Trainer]
) -> None:
    alice, _ = tenants
    context = visit(browser)
    page = context.new_page()
    sign_in(page, server.url, alice.key)
    page.goto(f"{server.url}/console/playground?model=tinker://{alice.run}/sampler_weights/early")
    page.get_by_label("Prompt").fill("lorry: n.")
    page.get_by_label("jargon-1m", exact=True).check()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens").fill("8")
    page.get_by_role("button", name="Sample").click()
    page.locator(".answer").nth(1).wait_for()
    names = page.locator(".answer h3").all_inner_texts()
    assert names == ["jargon-1m", f"tinker://{alice.run}/sampler_weights/early"]
    with httpx.Client(base_url=f"{server.url}/v1", headers={"X-API-Key": alice.key}, timeout=None) as api:
        asked = {"prompt": "lorry: n.", "max_tokens": 8, "temperature": 0, "logprobs": 0}
        for at, name in enumerate(names):
            (choice,) = api.post("completions", json=asked | {"model": name}).json()["choices"]
            assert page.locator(".tokens").nth(at).text_content() == choice["text"]
    page.screenshot(path=KEPT / "researcher-answers.png", full_page=True)
    check_accessible(page, "playground with answers")
    context.close()


def test_an_administrator_walks_every_page_makes_a_key_and_drains_an_actor(
    browser: Browser, server: Server, tenants: tuple[Trainer, Trainer]
) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    alice, bob = tenants
    key = administrator(server)
    seen = look_at(browser, server, key, "administrator", dict.fromkeys(ADMINISTRATOR, is_there))
    assert seen.complaints == []
    assert seen.elsewhere == []
    context = visit(browser)
    page = context.new_page()
    page.on("dialog", lambda dialog: dialog.accept())
    sign_in(page, server.url, key)
    assert page.url.endswith("/console/deployment")
    with httpx.Client(base_url=f"{server.url}/admin", headers={"X-API-Key": key}, timeout=None) as api:
        page.goto(f"{server.url}/console/tenants/alice")
        page.get_by_label("Name").fill("from the console")
        page.get_by_role("button", name="Make").click()
        made = page.locator(".note code").inner_text()
        assert {each["name"] for each in api.get("keys", params={"tenant": "alice"}).json()} >= {"from the console"}
        assert httpx.get(f"{server.url}/api/v1/training_runs", headers={"X-API-Key": made}).status_code == 200
        page.goto(f"{server.url}/console/tenants/alice")
        assert made not in page.content()
        page.get_by_label("Active runs").fill("1000")
        page.locator("form", has_text="Active runs").get_by_role("button", name="Set").click()
        page.wait_for_load_state()
        assert {"holder": "tenant:alice", "limits": 1000} in [
            {"holder": each["holder"], "limits": each["limits"]["runs"]} for each in api.get("limits").json()
        ]
        revoke = page.locator("tr", has_text="from the console").get_by_role("button", name="Revoke")
        revoke.click()
        page.locator("tr", has_text="from the console").get_by_text("revoked").wait_for()
    assert httpx.get(f"{server.url}/api/v1/training_runs", headers={"X-API-Key": made}).status_code == 401
    page.goto(f"{server.url}/console/deployment")
    page.get_by_role("button", name="Drain").click()
    page.get_by_text("stopped").first.wait_for()
    page.get_by_role("button", name="Drain").wait_for()  # it came again, and the page says so by itself
    bob.until(bob.step + 3)
    page.goto(f"{server.url}/console/audit")
    page.get_by_role("rowheader", name="actor drained").wait_for()
    context.close()
    alice.until(alice.step + 1)
