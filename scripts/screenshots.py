"""Make the pictures of the web page in ``docs``, from the page itself: `python scripts/screenshots.py`.

Needs the extra `web`, playwright and a Chromium (GLMTUNE_BROWSER names one that is not found). Further words
go to `glmtune web`; with a tuned prefix (`prefix_path=runs/ads`) base and tuned answer are beside each other.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

REPO = Path(__file__).resolve().parent.parent
SIZES = {1200: 800, 390: 780}
QUESTIONS = ("类型#上衣*颜色#杏色*风格#摇滚",)
"""Of `data/ads`, so that a prefix tuned on it shows what it learnt: single questions, no talk."""
COLOURS = 96
"""A picture of a page has few; so it stays small."""


def main() -> None:
    """Serve, open, ask, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("words", nargs="*", help="settings of `glmtune web`, such as prefix_path=runs/ads")
    parser.add_argument("--output", type=Path, default=REPO / "docs")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "glmtune", "web", "server_port=0", *arguments.words],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            pictures(address(server, log), arguments.output)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


def address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server says where it is."""
    while server.poll() is None:
        found = [word for word in log.read_text(encoding="utf-8").split() if word.startswith("http://")]
        if found:
            return found[0]
        time.sleep(0.2)
    raise SystemExit(log.read_text(encoding="utf-8"))


def pictures(url: str, folder: Path) -> None:
    """Ask the same on a wide and a narrow page."""
    with sync_playwright() as playwright:
        path = os.environ.get("GLMTUNE_BROWSER") or shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for width, height in SIZES.items():
            context = browser.new_context(viewport={"width": width, "height": height}, locale="en-US")
            page = context.new_page()
            page.goto(url)
            page.locator("#question textarea:enabled").wait_for()
            compares = page.locator("#compare input").count() == 1
            if compares:
                page.locator("#compare input").evaluate("box => box.click()")
            set_temperature(page, 0)
            for number, question in enumerate(QUESTIONS, start=1):
                ask(page, question, number)
            page.locator("#question textarea").blur()
            page.mouse.move(width / 2, 5)
            page.wait_for_timeout(500)
            file = folder / f"web-{width}.png"
            page.screenshot(path=file)
            Image.open(file).convert("RGB").quantize(COLOURS).save(file, optimize=True)
            context.close()
        browser.close()


def set_temperature(page: Any, value: float) -> None:
    """Make the pictures the same each time."""
    part = page.locator("#sampling > button")
    part.evaluate("button => button.click()")
    box = page.locator("#temperature input[type=number]")
    box.evaluate(
        "(box, value) => { box.value = value;"
        " for (const kind of ['input', 'blur']) box.dispatchEvent(new Event(kind)); }",
        str(value),
    )
    part.evaluate("button => button.click()")


def ask(page: Any, question: str, number: int) -> None:
    """Ask, and wait for the end of the answer."""
    page.locator("#question textarea").fill(question)
    page.keyboard.press("Enter")
    page.wait_for_function(
        "number => document.querySelectorAll('#main .bot.message').length === number"
        " && document.querySelectorAll('.submit-button').length === 1"
        " && !document.querySelector('#main').innerText.trim().endsWith('…')",
        arg=number,
        timeout=60000,
    )
    page.wait_for_timeout(800)


if __name__ == "__main__":
    main()
