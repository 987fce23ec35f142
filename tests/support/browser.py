"""A headless Chromium that opens pages from disk, and remembers what it logged and asked the network for."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
_PATIENCE = 30.0  # seconds; a busy machine is slow
_WIDTH, _HEIGHT = 1400, 900  # px

T = TypeVar("T")


class Browser:
    """A window of Chromium. Close it after use."""

    def __init__(self, chromium: str, driver: str, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in [*_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={_WIDTH},{_HEIGHT}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.downloads = folder / "downloads"
        allowed = {"behavior": "allow", "downloadPath": str(self.downloads)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)

    def close(self) -> None:
        self.driver.quit()

    def open(self, page: Path, address: str = "") -> None:
        """Open a page from disk afresh, at an address within it such as ``memory``, and wait until it shows it."""
        self.driver.get("about:blank")
        self.driver.get(f"{page.as_uri()}#{address}")
        self.until(lambda: self.count("main") == 1)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns; `arguments` are its ``arguments``."""
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: Callable[[], T]) -> T:
        """The first truthy value that `condition` gives. Raises AssertionError if none comes."""
        end = time.monotonic() + _PATIENCE
        while True:
            value = condition()
            if value:
                return value
            assert time.monotonic() < end, f"the page did not get there in {_PATIENCE} s: {self.text('body')[:2000]}"
            time.sleep(0.02)

    def count(self, selector: str) -> int:
        return len(self.run("return [...document.querySelectorAll(arguments[0])].map(() => 1)", selector))

    def texts(self, selector: str) -> list[str]:
        """The text of each element that the CSS selector finds."""
        text = "each => each.innerText ?? each.textContent"  # the latter of what is drawn
        found = self.run(f"return [...document.querySelectorAll(arguments[0])].map({text})", selector)
        return [" ".join(text.split()) for text in found]

    def text(self, selector: str) -> str:
        """The text of the one element that the CSS selector finds."""
        (found,) = self.until(lambda: self.texts(selector))
        return found

    def click(self, selector: str, text: str | None = None) -> None:
        """Click the first element that the CSS selector finds, of those with `text` in them."""

        def element() -> Any:
            found = self.driver.find_elements(By.CSS_SELECTOR, selector)
            return next((each for each in found if text is None or text in each.text), None)

        self.until(element).click()

    def keys(self, *keys: str) -> None:
        """Type into what has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def point(self, selector: str, x: float, y: float, *, click: bool = False) -> None:
        """Move the mouse to (x, y) px from the left upper corner of an element, and click there if asked to."""
        box = self.run("const b = document.querySelector(arguments[0]).getBoundingClientRect(); return b", selector)
        chain = ActionChains(self.driver)
        chain.w3c_actions.pointer_action.move_to_location(round(box["x"] + x), round(box["y"] + y))
        if click:
            chain.w3c_actions.pointer_action.click()
        chain.perform()

    def saved(self, name: str) -> str:
        """The text of a file that the page handed over."""
        path = self.downloads / name
        self.until(path.is_file)
        return path.read_text()

    @property
    def address(self) -> str:
        """What stands behind the ``#``."""
        return str(self.run("return location.hash.slice(1)"))

    def complaints(self) -> list[str]:
        """What was logged since the last call: errors and warnings alike."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The URLs that pages from disk asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [each["params"] for each in entries if each["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked if each["documentURL"].startswith("file:")]


def find_browser() -> tuple[str, str]:
    """Chromium and its driver. Skips the test where they are missing; fails it where GRAPHOPT_REQUIRE_BROWSER=1."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium and driver:
        return chromium, driver
    missing = "the page is tested in Chromium: install it and its driver (Debian: chromium, chromium-driver)"
    if os.environ.get("GRAPHOPT_REQUIRE_BROWSER") == "1":
        pytest.fail(missing)
    pytest.skip(missing)
