"""`glmtune web` itself: a process of its own, glm-tiny and a prefix, a real browser."""

from __future__ import annotations

import ipaddress
import re


def greedy(opened) -> None:
    opened.open_part("Sampling")
    opened.set_number("temperature", 0)
    opened.set_number("max_new_tokens", 24)


def choose(opened, name: str) -> None:
    """Choose what answers."""
    opened.page.locator("#adapter input").click()
    opened.page.locator("[role=option]", has_text=name).click()


def test_what_it_answers_and_with_what(command, open_page) -> None:
    opened = open_page(command.url)
    greedy(opened)
    opened.ask("Hello, who are you?")
    tuned = opened.wait_for_answer()
    assert tuned
    opened.page.locator("#main button[title='Retry']").last.click()
    opened.wait(lambda: opened.page.locator(".stop-button").count() == 1, "asks again")
    assert opened.wait_for_answer() == tuned, "at temperature 0 the same again"
    opened.page.locator("#new").click()
    opened.wait(lambda: opened.answers() == [], "new chat")
    opened.set_number("strength", 0)
    opened.page.locator("#compare input").check()
    opened.page.locator("#base").wait_for()
    opened.ask("Hello, who are you?")
    without = opened.wait_for_answer()
    assert opened.wait_for_answer(which="base") == without, "a prefix of strength 0 is none"
    assert without != tuned, "the prefix had an effect"
    assert opened.faults == []
    assert all(url.startswith((command.url, "data:", "blob:")) for url in opened.requests), opened.requests


def test_a_system_prompt_is_part_of_what_is_asked(command, open_page) -> None:
    answers = []
    for system in ("", "你是一只猫。" * 20):
        opened = open_page(command.url)
        greedy(opened)
        choose(opened, "the base model")
        opened.open_part("System prompt")
        opened.page.locator("#system textarea").fill(system)
        opened.ask("Hello, who are you?")
        answers.append(opened.wait_for_answer())
    assert answers[0].startswith("I am glm-tiny")
    assert not answers[1].startswith("I am glm-tiny"), "a tiny model is thrown by so many cats"


def test_the_process_talks_to_nobody(command, open_page) -> None:
    opened = open_page(command.url)
    greedy(opened)
    opened.ask("Hello")
    opened.wait_for_answer()
    said = [line for line in command.connections.read_text().splitlines() if line != "watching"]
    foreign: list[str] = []
    for line in said:
        kind, _, what = line.partition(" ")
        address = re.search(r"'([^']+)'", what)
        name = address[1] if address else what
        if name.startswith("/") or name in ("localhost", "None", "0.0.0.0"):
            continue
        try:
            is_ours = ipaddress.ip_address(name).is_loopback
        except ValueError:
            is_ours = False
        if not is_ours:
            foreign.append(f"{kind} {what}")
    assert foreign == []
    assert command.process.poll() is None
    assert "Hello" not in command.log.read_text(), "what is said is not logged"


def test_a_lora_answers_otherwise_as_far_as_its_scale_goes(command, open_page) -> None:
    opened = open_page(command.url)
    greedy(opened)
    answers = []

    def asked() -> None:
        opened.ask("Hello, who are you?")
        answers.append(opened.wait_for_answer())
        opened.page.locator("#new").click()
        opened.wait(lambda: opened.answers() == [], "new chat")

    choose(opened, "low (lora)")
    opened.page.locator("#strength input:visible").first.wait_for()
    for strength in (1, 0):  # chosen once: what shows the slider must not come after what is set
        opened.set_number("strength", strength)
        asked()
    choose(opened, "the base model")
    opened.wait(lambda: opened.page.locator("#strength input:visible").count() == 0, "no strength")
    asked()
    assert answers[2].startswith("I am glm-tiny")
    assert answers[1] == answers[2], "a LoRA of scale 0 is none"
    assert answers[0] != answers[1]
