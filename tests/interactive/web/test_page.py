"""The page in a real browser, over answers that the tests write themselves."""

from __future__ import annotations

import json

from glmtune.inference.requests.chat import TextDelta
from glmtune.interactive.web.safe_markdown import plain
from tests.interactive.web.conftest import calls, says, serving

HOSTILE = """<img src=x onerror="window.broken=1"> <script>window.broken=1</script>
<b>bold</b> ![see](http://elsewhere.invalid/x.png) [link](javascript:window.broken=1)
<iframe src="http://elsewhere.invalid/"></iframe>

```html
<script>window.broken = 1</script>
```
Use `<div>` and \\(a<b\\) and $x_1$."""


def contents(asked) -> list[str]:
    return [message["content"] for message in asked.messages]


def test_a_question_is_answered_and_the_next_one_knows_of_it(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: says(f"answer {len(asked.messages)}")
    opened.ask("first")
    assert opened.wait_for_answer(1) == "answer 1"
    assert opened.question.input_value() == ""
    opened.ask("second")
    assert opened.wait_for_answer(2) == "answer 3"
    assert contents(scripted.answerer.asked[1]) == ["first", "answer 1", "second"]
    assert opened.questions() == ["first", "second"]
    assert opened.faults == []


def test_an_answer_is_shown_while_it_is_written_and_stop_cancels_it(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: None
    opened.ask("go on")
    opened.wait(lambda: "word3" in "".join(opened.answers()), "streams")
    assert not scripted.answerer.asked[0].is_cancelled.is_set()
    opened.page.locator(".stop-button").click()
    text = opened.wait_for_answer(1)
    assert scripted.answerer.asked[0].is_cancelled.wait(10)
    assert "word3" in text
    assert text.endswith("— stopped —")
    scripted.answerer.script = lambda asked: says("ok")
    opened.ask("and now?")
    opened.wait_for_answer(2)
    assert "word3" in contents(scripted.answerer.asked[1])[1], "what came stays in the conversation"
    assert "stopped" not in contents(scripted.answerer.asked[1])[1]


def test_closing_the_tab_cancels(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: None
    opened.ask("go on")
    opened.wait(lambda: "word" in "".join(opened.answers()), "streams")
    opened.page.close()
    assert scripted.answerer.asked[0].is_cancelled.wait(20)


def test_regenerate_asks_the_same_again(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    numbers = iter(range(9))
    scripted.answerer.script = lambda asked: says(f"answer {next(numbers)}")
    opened.ask("why?")
    assert opened.wait_for_answer() == "answer 0"
    opened.page.locator("#main button[title='Retry']").last.click()
    opened.wait(lambda: opened.answers() == ["answer 1"], "regenerated")
    assert contents(scripted.answerer.asked[1]) == ["why?"]


def test_an_edited_question_takes_all_that_followed_with_it(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: says(f"to {asked.messages[-1]['content']}")
    for number, text in enumerate(("one *<b>*", "two", "three"), start=1):
        opened.ask(text)
        opened.wait_for_answer(number)
    assert opened.page.locator("#main .user.message em").count() == 0
    opened.page.locator("#main button[title='Edit']").nth(0).click()
    box = opened.page.locator("#main .user.message textarea")
    assert plain(box.input_value()) == "one *<b>*"
    box.press("End")
    box.type(" and more")
    opened.page.locator("#main button[title='Submit']").click()
    opened.wait(lambda: opened.answers() == ["to one <b> and more"], "edited")
    assert contents(scripted.answerer.asked[-1]) == ["one *<b>* and more"], (
        "without what parts the tag for the page"
    )


def test_clear_and_new_chat(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    opened.ask("first chat")
    opened.wait_for_answer()
    opened.page.locator("#new").click()
    opened.wait(lambda: opened.answers() == [], "new chat")
    opened.ask("second chat")
    opened.wait_for_answer()
    assert contents(scripted.answerer.asked[-1]) == ["second chat"]
    entries = opened.page.locator("#chat_list label")
    assert entries.all_inner_texts() == ["second chat", "first chat"]
    entries.nth(1).click()
    opened.wait(lambda: opened.questions() == ["first chat"], "opened again")
    opened.page.reload()
    opened.wait(lambda: opened.questions() == ["first chat"], "kept by the browser")
    assert opened.page.locator("#chat_list label").count() == 2
    opened.page.locator("#main button[title='Clear']").click()
    opened.wait(lambda: opened.questions() == [] and entries.count() == 1, "cleared")
    opened.page.reload()
    opened.question.wait_for()
    opened.wait(lambda: entries.count() == 1, "it stays cleared")
    assert opened.questions() == []
    opened.page.once("dialog", lambda dialog: dialog.accept())
    opened.page.locator("#chat_list label").click()
    opened.wait(lambda: opened.questions() == ["second chat"], "the other one")
    opened.page.locator("#delete").click()
    opened.wait(lambda: opened.page.locator("#chat_list label").count() == 0, "deleted")


def test_a_chat_is_saved_and_opened_as_a_file(scripted, open_page, tmp_path) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: says("好的")
    opened.ask("你好")
    opened.wait_for_answer()
    with opened.page.expect_download() as download:
        opened.page.locator("#download").click()
    saved = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert [message["content"] for message in saved["messages"]] == ["你好", "好的"]
    file = tmp_path / "other.json"
    rows = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    file.write_text(json.dumps({"messages": rows}), encoding="utf-8")
    with opened.page.expect_file_chooser() as chooser:
        opened.page.locator("#upload").click()
    chooser.value.set_files(file)
    opened.wait(lambda: opened.questions() == ["q"], "opened")
    opened.ask("next")
    opened.wait_for_answer(2)
    assert contents(scripted.answerer.asked[-1]) == ["be brief", "q", "a", "next"]
    file.write_text("[1]", encoding="utf-8")
    with opened.page.expect_file_chooser() as chooser:
        opened.page.locator("#upload").click()
    chooser.value.set_files(file)
    opened.page.locator(".toast-body", has_text="Message 1").wait_for()
    assert opened.questions() == ["q", "next"], "what was open stays"


def test_what_is_chosen_is_what_is_asked_with(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    opened.open_part("System prompt")
    opened.page.locator("#system textarea").fill("be brief")
    opened.open_part("Sampling")
    values = {
        "max_new_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "repetition_penalty": 1.2,
        "seed": 4,
    }
    for name, value in values.items():
        opened.set_number(name, value)
    opened.set_number("strength", 0.25)
    opened.ask("hello")
    opened.wait_for_answer()
    asked = scripted.answerer.asked[-1]
    assert asked.sampling == values
    assert (asked.adapter, asked.strength) == ("ads", 0.25)
    assert contents(asked) == ["be brief", "hello"]
    opened.page.locator("button", has_text="As the release does").click()
    opened.wait(
        lambda: opened.page.locator("#temperature input[type=number]").input_value() == "0.8", "reset"
    )


def test_two_answers_beside_each_other(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: says(f"{asked.adapter or 'base'} {len(asked.messages)}")
    opened.page.locator("#compare input").check()
    opened.page.locator("#base").wait_for()
    opened.ask("which?")
    assert opened.wait_for_answer() == "ads 1"
    assert opened.wait_for_answer(which="base") == "base 1"
    opened.ask("again")
    assert opened.wait_for_answer(2) == "ads 3"
    assert opened.answers("base") == ["base 1", "base 3"]
    by_base = next(asked for asked in scripted.answerer.asked[2:] if not asked.adapter)
    assert contents(by_base) == ["which?", "base 1", "again"], "each goes on from its own answers"
    left, right = (opened.page.locator(name).bounding_box() for name in ("#base", "#main"))
    assert left["x"] + left["width"] <= right["x"] + 1
    scripted.answerer.script = lambda asked: None
    opened.ask("go on")
    for which in ("main", "base"):
        opened.wait(lambda which=which: "word3" in opened.answers(which)[-1], f"{which} streams")
    opened.page.locator(".stop-button").click()
    opened.wait_for_answer(3)
    assert all(asked.is_cancelled.wait(10) for asked in scripted.answerer.asked[4:])


def test_nothing_of_an_answer_runs_and_none_of_it_is_swallowed(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: says(HOSTILE)
    opened.ask("close the <div> with </div> <img src=x onerror=window.broken=1>")
    text = opened.wait_for_answer()
    assert "<script>window.broken=1</script>" in text
    assert "<b>bold</b>" in text
    assert "<div>" in text
    assert "<div> with </div>" in opened.questions()[0]
    main = opened.page.locator("#main")
    assert "<script>window.broken = 1</script>" in main.locator("pre code").inner_text(), "code to the letter"
    assert main.locator(".message script, .message iframe, .message img, .message b").count() == 0
    assert main.locator(".message a[href^='javascript']").count() == 0
    assert main.locator(".katex").count() == 2, "formulas are set"
    # Even what got past every cleaning would not run: the page's policy allows no script of a text.
    opened.page.evaluate(
        "() => { const place = document.createElement('div'); document.body.append(place);"
        ' place.innerHTML = \'<img src="data:," onerror="window.broken=2">\'; }'
    )
    opened.page.wait_for_timeout(300)
    assert opened.page.evaluate("window.broken") is None
    assert all(url.startswith((scripted.url, "data:", "blob:")) for url in opened.requests)
    assert opened.page.locator("#top .model").inner_text() == "scripted <b>model</b>"


def test_a_tool_is_shown_not_executed_and_its_result_goes_back(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: calls("get_weather", '{"city": "北京"}')
    opened.open_part("Tools")
    tools = '[{"name": "get_weather", "parameters": {"type": "object"}}]'
    opened.page.locator("#tools textarea").fill(tools)
    opened.ask("天气？")
    text = opened.wait_for_answer()
    assert "get_weather" in text
    assert "not executed" in text
    assert '{"city": "北京"}' in text
    assert scripted.answerer.asked[0].tools[0]["name"] == "get_weather"
    assert "get_weather" in opened.question.get_attribute("placeholder")
    scripted.answerer.script = lambda asked: says("晴")
    opened.ask("sunny")
    opened.wait_for_answer(2)
    assert [message["role"] for message in scripted.answerer.asked[1].messages] == [
        "user",
        "assistant",
        "tool",
    ]
    assert scripted.answerer.asked[1].messages[-1]["content"] == "sunny"


def test_what_fails_says_why_and_can_be_asked_again(scripted, open_page) -> None:
    from glmtune.errors import GlmtuneError

    def fails(asked):
        raise GlmtuneError("The queue is full <b>now</b>.")

    opened = open_page(scripted.url)
    scripted.answerer.script = fails
    opened.ask("hello")
    toast = opened.page.locator(".toast-body")
    toast.wait_for()
    assert "The queue is full <b>now</b>." in toast.inner_text()
    opened.wait(lambda: opened.question.input_value() == "hello", "the question is back")
    assert opened.questions() == []
    scripted.answerer.script = lambda asked: says("ok", "length")
    opened.question.press("Enter")
    assert opened.wait_for_answer().startswith("ok")
    assert "cut" in opened.answers()[0]


def test_the_page_speaks_the_readers_language(scripted, open_page) -> None:
    opened = open_page(scripted.url, locale="zh-CN")
    assert opened.page.url == f"{scripted.url}/zh"
    opened.wait(lambda: opened.page.locator("#new").inner_text() == "新对话", "in Chinese")
    opened.ask("你好")
    opened.wait_for_answer()
    opened.page.locator("#other_language").click()
    opened.page.locator("#new", has_text="New chat").wait_for()
    opened.wait(lambda: opened.questions() == ["你好"], "the chat came along")
    assert open_page(scripted.url, locale="fr").page.url == f"{scripted.url}/"


def test_on_a_phone(scripted, open_page) -> None:
    opened = open_page(scripted.url, width=390, has_touch=True, is_mobile=True)
    opened.wait(lambda: opened.page.locator("#side.open").count() == 0, "the chat is not covered")
    scripted.answerer.script = lambda asked: says(
        "w" * 300 + "\n```\n" + "x" * 400 + "\n```\n| a | b |\n|---|---|\n| 1 | 2 |"
    )
    opened.ask("q" * 200)
    opened.wait_for_answer()
    wide = "() => [document.documentElement.scrollWidth, window.innerWidth]"
    scroll, width = opened.page.evaluate(wide)
    assert scroll <= width == 390
    opened.page.locator("#side .toggle-button").click()
    opened.page.locator("#compare input").check()
    opened.page.locator("#side .toggle-button").click()
    opened.ask("both")
    opened.wait_for_answer(2)
    base, main = (opened.page.locator(name).bounding_box() for name in ("#base", "#main"))
    assert base["y"] + base["height"] <= main["y"] + 1, "one under the other"
    assert main["width"] > 300
    scroll, width = opened.page.evaluate(wide)
    assert scroll <= width


def test_only_who_logs_in_may_ask(open_page, tmp_path, monkeypatch) -> None:
    from glmtune.interactive.web.login import read_login

    file = tmp_path / "users"
    file.write_text("# who may\nann:s:ecret\n", encoding="utf-8")
    with serving(read_login(str(file))) as served:
        opened = open_page(served.url)
        boxes = opened.page.locator("input")
        boxes.nth(0).fill("ann")
        boxes.nth(1).fill("wrong")
        opened.page.locator("button").first.click()
        opened.page.get_by_text("Incorrect").wait_for()
        boxes.nth(0).fill("ann")
        boxes.nth(1).fill("s:ecret")
        opened.page.locator("button").first.click()
        opened.question.wait_for()
        opened.ask("hello")
        assert opened.wait_for_answer() == "ok"
        assert all(url.startswith((served.url, "data:")) for url in opened.requests)


def test_several_are_answered_at_once(scripted, open_page) -> None:
    pages = [open_page(scripted.url) for _ in range(3)]
    scripted.answerer.script = lambda asked: None
    for number, opened in enumerate(pages):
        opened.ask(f"page {number}")
    for opened in pages:
        opened.wait(lambda opened=opened: "word5" in "".join(opened.answers()), "streams")
    pages[1].page.locator(".stop-button").click()
    pages[1].wait_for_answer()
    states = {asked.messages[0]["content"]: asked.is_cancelled.is_set() for asked in scripted.answerer.asked}
    assert states == {"page 0": False, "page 1": True, "page 2": False}
    for opened in (pages[0], pages[2]):
        opened.page.locator(".stop-button").click()
        opened.wait_for_answer()


def test_text_that_follows_is_one_answer(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: [TextDelta("a"), TextDelta(" b"), *says(" c")]
    opened.ask("x")
    assert opened.wait_for_answer() == "a b c"
