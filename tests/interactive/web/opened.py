"""A page of `glmtune web` that is open in a browser: what a test does there, and what it sees."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glmtune.interactive.web.shown import PENDING


@dataclass
class OpenPage:
    """A page in a browser, and what it asked for."""

    page: Any
    requests: list[str]
    faults: list[str]

    @property
    def question(self) -> Any:
        return self.page.locator("#question textarea")

    def ask(self, text: str) -> None:
        self.question.fill(text)
        self.question.press("Enter")

    def answers(self, which: str = "main") -> list[str]:
        return self._texts(f"#{which} .bot.message")

    def questions(self, which: str = "main") -> list[str]:
        return self._texts(f"#{which} .user.message")

    def _texts(self, place: str) -> list[str]:
        # As a reader sees them: without what parts a tag.
        return [
            text.strip().replace("\u200b", "").replace("\ufeff", "")
            for text in self.page.locator(place).all_inner_texts()
        ]

    def wait(self, is_so: Callable[[], bool], what: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < until, f"{what}: {self.questions()} {self.answers()} {self.faults}"
            self.page.wait_for_timeout(50)

    def wait_for_answer(self, number: int = 1, which: str = "main") -> str:
        """Wait for the end of the answer of this number, and return it."""

        def is_there() -> bool:
            answers, is_idle = self.answers(which), self.page.locator(".submit-button").count() == 1
            return is_idle and len(answers) == number and answers[-1] != PENDING

        self.wait(is_there, f"answer {number}")
        return self.answers(which)[-1]

    def open_part(self, name: str) -> None:
        self.page.locator("button.label-wrap", has_text=name).click()

    def set_number(self, name: str, value: float | str) -> None:
        box = self.page.locator(f"#{name} input[type=number]").first
        box.fill(str(value))
        box.press("Tab")


def open_in(context: Any, url: str) -> OpenPage:
    """Open an address, and wait until something can be typed."""
    page = context.new_page()
    found = OpenPage(page, [], [])
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("pageerror", lambda error: found.faults.append(str(error)))
    page.on("console", lambda line: line.type == "error" and found.faults.append(line.text))
    page.goto(url)
    ready = page.locator("#question textarea:enabled").or_(page.locator("input[type=password]"))
    ready.wait_for(timeout=30000)
    return found
