"""Who looks at the console, by HTTP or in a browser."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NO_CHROMIUM = "there is no Chromium: apt-get install chromium"


@contextmanager
def signed_in(url: str, key: str) -> Iterator[httpx.Client]:
    """As pages of this site ask."""
    with httpx.Client(base_url=f"{url}/console", headers={"origin": url}, timeout=None) as client:
        answer = client.post("sign-in", data={"api_key": key})
        assert answer.status_code == 303, answer.text
        yield client


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without these it looks for hosts elsewhere at every start.
        quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        try:
            yield browser
        finally:
            browser.close()


def visit(browser: Browser, **how: Any) -> BrowserContext:
    """Nothing is waited for in vain but until pytest ends the test."""
    context = browser.new_context(**how)
    context.set_default_timeout(0)
    return context


def sign_in(page: Page, url: str, key: str) -> None:
    page.goto(f"{url}/console")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url("**/console/**")
    page.get_by_role("button", name="Sign out").wait_for()
