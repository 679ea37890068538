"""What is typed or sent stays, however late the page learns what became of other events."""

from __future__ import annotations

import threading

from glmtune.errors import GlmtuneError
from tests.interactive.web.conftest import says

# Hands on what a stream of events says, but the message that closes it a second late: as if it was on its way.
LATE_CLOSE = """() => {
  const fetched = window.fetch.bind(window), text = new TextDecoder(), bytes = new TextEncoder();
  window.closing = 0;
  const late = {async transform(chunk, stream) {
    const said = text.decode(chunk), place = said.indexOf('data: {"msg":"close_stream"');
    if (place < 0) return stream.enqueue(chunk);
    stream.enqueue(bytes.encode(said.slice(0, place)));
    window.closing += 1;
    await new Promise((done) => setTimeout(done, 1000));
    stream.enqueue(bytes.encode(said.slice(place)));
  }};
  window.fetch = async (what, ...more) => {
    const reply = await fetched(what, ...more);
    if (!String(what.url || what).includes("/queue/data")) return reply;
    return new Response(reply.body.pipeThrough(new TransformStream(late)), reply);
  };
}"""


def with_late_closes(opened) -> None:
    opened.page.add_init_script(f"({LATE_CLOSE})()")
    opened.page.reload()
    opened.page.locator("#question textarea:enabled").wait_for()


def closes(opened) -> int:
    return opened.page.evaluate("window.closing")


def questions(scripted) -> list[str]:
    return [asked.messages[-1]["content"] for asked in scripted.answerer.asked]


def test_a_question_while_the_stream_of_the_first_event_closes(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    with_late_closes(opened)
    opened.wait(lambda: closes(opened) == 1, "the stream of the page's first event is about to close")
    opened.ask("hello")
    assert opened.wait_for_answer() == "ok"
    assert questions(scripted) == ["hello"]
    assert opened.faults == []


def test_a_question_while_the_stream_of_a_control_closes(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    with_late_closes(opened)
    opened.page.wait_for_timeout(1500)
    before = closes(opened)
    opened.page.locator("#compare input").check()
    opened.page.locator("#base").wait_for()
    opened.wait(lambda: closes(opened) > before, "the stream of the control is about to close")
    opened.ask("hello")
    assert opened.wait_for_answer() == "ok"
    assert opened.wait_for_answer(which="base") == "ok"
    assert opened.faults == []


def test_what_is_sent_while_an_answer_is_written_is_asked_after_it(scripted, open_page) -> None:
    opened = open_page(scripted.url)
    scripted.answerer.script = lambda asked: None
    opened.ask("first")
    opened.wait(lambda: "word" in "".join(opened.answers()), "streams")
    opened.ask("second")
    scripted.answerer.script = lambda asked: says("to the second")
    opened.page.locator(".stop-button").click()
    assert opened.wait_for_answer(2) == "to the second"
    assert questions(scripted) == ["first", "second"]
    assert opened.question.input_value() == ""


def test_a_question_that_fails_does_not_replace_what_is_typed_meanwhile(scripted, open_page) -> None:
    may_fail = threading.Event()

    def fails(asked):
        assert may_fail.wait(20)
        raise GlmtuneError("No room.")

    opened = open_page(scripted.url)
    scripted.answerer.script = fails
    opened.ask("first")
    opened.wait(lambda: opened.questions() == ["first"], "asked")
    opened.question.fill("second, half wri")
    may_fail.set()
    opened.page.locator(".toast-body").wait_for()
    opened.wait(lambda: opened.questions() == [], "taken back")
    opened.page.wait_for_timeout(300)
    assert opened.question.input_value() == "second, half wri"
