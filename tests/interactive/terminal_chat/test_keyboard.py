"""The line that is typed: keys in, text out, by prompt_toolkit's own input of tests."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from glmtune.interactive.answerer import AdapterChoice
from glmtune.interactive.terminal_chat.keyboard import CommandCompleter, Keyboard, was_typed
from glmtune.interactive.terminal_chat.session import Session
from tests.interactive.scripted import ScriptedAnswerer


def typed(keys: str, *, history_file: Path | None = None, draft: str = "", times: int = 1) -> list[str]:
    session = Session(ScriptedAnswerer([]))
    with create_pipe_input() as given:
        given.send_text(keys)
        keyboard = Keyboard(session, history_file=history_file, input=given, output=DummyOutput())
        return [keyboard.ask(draft) for _ in range(times)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("你好\r", "你好"),
        ("hello\n", "hello"),
        ("一\x1b\r二\r", "一\n二"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("path\\\\\r", "path\\\\"),
        ("\x1b[200~one\ntwo\r\nthree\x1b[201~\r", "one\ntwo\nthree"),
        ("你好吗\x7f\x7f们\r", "你们"),
        ("坏\x1b[D不\r", "不坏"),
        ("👨‍👩‍👧 한국어 ｆｕｌｌ\r", "👨‍👩‍👧 한국어 ｆｕｌｌ"),
    ],
)
def test_lines(keys: str, expected: str) -> None:
    assert typed(keys) == [expected]


def test_a_draft_is_there_to_be_changed() -> None:
    assert typed("吗？\r", draft="好") == ["好吗？"]


def test_what_was_typed_comes_back_also_next_time(tmp_path: Path) -> None:
    file = tmp_path / "state" / "chat_history"
    assert typed("一\x1b\r二\r三\r\x1b[A\x1b[A\x1b[A\r", history_file=file, times=3)[0] == "一\n二"
    assert typed("\x1b[A\r", history_file=file)[0] in ("三", "一\n二")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    assert typed("x\r", history_file=tmp_path / "file" / "history") == ["x"]
    assert typed("x\r", history_file=tmp_path) == ["x"]


@pytest.mark.parametrize(("keys", "is_typed"), [("\x03", False), ("words\x03", True)])
def test_interrupt(keys: str, is_typed: bool) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        typed(keys)
    assert was_typed(caught.value) is is_typed


def test_words_that_were_interrupted_come_back() -> None:
    session = Session(ScriptedAnswerer([]))
    with create_pipe_input() as given:
        keyboard = Keyboard(session, input=given, output=DummyOutput())
        given.send_text("long words\x03")
        with pytest.raises(KeyboardInterrupt):
            keyboard.ask()
        given.send_text("\x1b[A\r")
        assert keyboard.ask() == "long words"


def test_ctrl_d_leaves_an_empty_line_only() -> None:
    with pytest.raises(EOFError):
        typed("\x04")
    assert typed("ab\x1b[D\x04\r") == ["a"]


def test_results_are_not_in_the_history() -> None:
    session = Session(ScriptedAnswerer([]))
    with create_pipe_input() as given:
        keyboard = Keyboard(session, input=given, output=DummyOutput())
        given.send_text("question\r")
        keyboard.ask()
        given.send_text('{"x":\x1b\r1}\r')
        assert keyboard.ask_result("a\x1b[31m") == '{"x":\n1}'
        given.send_text("\x1b[A\r")
        assert keyboard.ask() == "question"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/te", ["temperature"]),
        ("/s", ["system", "seed", "strength", "save", "stop"]),
        ("/adapter ", ["style", "base"]),
        ("/adapter s", ["style"]),
        ("/temperature ", ["default"]),
        ("te", []),
        ("//te", []),
        ("a /te", []),
        ("/nothing ", []),
    ],
)
def test_completion(text: str, expected: list[str]) -> None:
    completer = CommandCompleter(Session(ScriptedAnswerer([], adapters=[AdapterChoice("style", "prefix")])))
    found = completer.get_completions(Document(text), CompleteEvent())
    assert [each.text for each in found] == expected


def test_files_are_completed(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text("[]", "utf-8")
    completer = CommandCompleter(Session(ScriptedAnswerer([])))
    found = list(completer.get_completions(Document(f"/tools {tmp_path}/to"), CompleteEvent()))
    assert [each.text for each in found] == ["ols.json"]
