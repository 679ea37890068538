"""The chat by turns, with scripted keys and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from glmtune.errors import DataError, GlmtuneError
from glmtune.inference.requests.chat import CallDelta, CallStart, Finished, TextDelta
from glmtune.interactive.answerer import AdapterChoice
from glmtune.interactive.terminal_chat.display import Display
from glmtune.interactive.terminal_chat.loop import TerminalChat
from glmtune.interactive.terminal_chat.session import Session
from glmtune.signals import StoppedBySignal
from tests.interactive.scripted import HOSTILE, STOP, ScriptedAnswerer, called, said


class Keys:
    """Gives lines, or raises what stands in their place; at their end Ctrl-D."""

    def __init__(self, *lines: str | type[BaseException] | BaseException) -> None:
        self._lines = list(lines)
        self.drafts: list[str] = []

    def ask(self, draft: str = "") -> str:
        self.drafts.append(draft)
        line = self._lines.pop(0) if self._lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def ask_result(self, name: str) -> str:
        return self.ask(f"result of {name}")


def talk(answers: Sequence[Any], *lines: Any, **options: Any) -> tuple[Session, Keys]:
    session, keys = Session(ScriptedAnswerer(answers, **options)), Keys(*lines)
    TerminalChat(session, keys, Display()).run()
    return session, keys


def asked(session: Session) -> list[dict[str, Any]]:
    answerer = session.answerer
    assert isinstance(answerer, ScriptedAnswerer)
    return answerer.asked


def texts(session: Session) -> list[str]:
    return [turn["content"] for turn in session.conversation.messages]


def test_questions_and_answers_by_turns(capsys: pytest.CaptureFixture[str]) -> None:
    session, _ = talk([said("您好"), said("再会")], " 你好 ", "", "再见")
    assert texts(session) == ["你好", "您好", "再见", "再会"]
    assert [len(each["messages"]) for each in asked(session)] == [1, 3]
    assert "您好\n" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["stop", "exit", "quit", " stop ", "/stop", "/exit", "/quit"])
def test_words_that_leave(word: str) -> None:
    session, _ = talk([], word, "never asked")
    assert asked(session) == []


def test_clear_forgets_and_keeps_the_system_prompt() -> None:
    session, _ = talk([said("a"), said("b")], "/system 简短", "x", "clear", "y")
    assert texts(session) == ["简短", "y", "b"]


def test_words_within_a_question_are_no_commands() -> None:
    session, _ = talk([said("a"), said("b"), said("c")], "stop it", "Clear", "//stop")
    assert texts(session)[::2] == ["stop it", "Clear", "/stop"]


def test_what_looks_like_a_command_is_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    session, _ = talk([], "/temprature 1")
    out = capsys.readouterr().out
    assert asked(session) == []
    assert "`/temprature` is no command. Did you mean `/temperature`?" in out
    assert "`//temprature`" in out


def test_an_interrupted_answer_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    script = [TextDelta("一，二"), STOP, TextDelta("，三"), Finished("stop", 1, 5)]
    session, _ = talk([script, said("好")], "数数", "够了")
    assert texts(session) == ["数数", "一，二", "够了", "好"]
    assert session.answerer.cancelled == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert "一，二\n[stopped]" in capsys.readouterr().out


def test_interrupted_before_the_first_word_all_is_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    session, _ = talk([said("a"), [STOP]], "x", "y")
    assert texts(session) == ["x", "a"]
    assert "the Up key brings your words back" in capsys.readouterr().out


def test_a_retry_that_is_interrupted_keeps_the_old_answer() -> None:
    session, _ = talk([said("a"), [STOP], said("b")], "x", "/retry", "/retry")
    assert texts(session) == ["x", "b"]
    session, _ = talk([said("a"), [STOP]], "x", "/retry")
    assert texts(session) == ["x", "a"]


def test_edit_puts_the_question_up_again() -> None:
    session, keys = talk(
        [said("a"), said("b"), said("c")], "x", "y", "/edit", "/z", "/edit 1", KeyboardInterrupt
    )
    assert texts(session) == ["x", "a", "/z", "c"]
    assert keys.drafts[3] == "y"
    assert keys.drafts[5] == "x"


def test_an_edited_question_that_cannot_be_asked_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    session, _ = talk([said("a"), DataError("No such form.")], "x", "/edit", "y")
    assert texts(session) == ["x", "a"]
    assert "No such form." in capsys.readouterr().out


def test_an_answer_that_fails_keeps_what_came(capsys: pytest.CaptureFixture[str]) -> None:
    session, _ = talk([[TextDelta("一"), GlmtuneError("The server is gone.")]], "x")
    assert texts(session) == ["x", "一"]
    assert "The server is gone." in capsys.readouterr().out


def test_calls_are_shown_and_their_results_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    calls = [
        TextDelta("我查"),
        CallStart(0, "weather"),
        CallDelta(0, '{"city": "北京"}'),
        CallStart(1, "clock"),
        Finished("tool_calls", 1, 1),
    ]
    session, keys = talk([calls, said("晴，八点")], "天气？", "晴", "八点")
    assert 'calls weather {"city": "北京"}\ncalls clock \n' in capsys.readouterr().out
    assert keys.drafts[1:3] == ["result of weather", "result of clock"]
    assert [turn["role"] for turn in asked(session)[1]["messages"]] == ["user", "assistant", "tool", "tool"]
    assert texts(session)[-1] == "晴，八点"


@pytest.mark.parametrize("skip", ["", "  ", KeyboardInterrupt])
def test_a_result_may_be_left_out(skip: Any) -> None:
    session, _ = talk([called("weather"), said("好")], "天气？", skip, "算了")
    assert texts(session) == ["天气？", "算了", "好"]


def test_a_call_that_was_cut_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    script = [TextDelta("查"), CallStart(0, "a"), CallDelta(0, '{"x": '), Finished("length", 1, 9)]
    session, _ = talk([script], "x")
    out = capsys.readouterr().out
    assert "a call has no whole arguments" in out
    assert "/max_new_tokens" in out
    assert texts(session) == ["x", "查"]


def test_interrupt_twice_leaves_and_once_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    session, keys = talk([said("a")], KeyboardInterrupt, "x", KeyboardInterrupt, KeyboardInterrupt, "never")
    assert texts(session) == ["x", "a"]
    assert len(keys.drafts) == 4
    assert "once more, or Ctrl-D, leaves" in capsys.readouterr().out


def test_a_signal_that_ends_commands_ends_the_chat() -> None:
    with pytest.raises(StoppedBySignal):
        talk([], StoppedBySignal(15))


def test_what_is_chosen_goes_along(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "weather", "description": "", "parameters": {}}]), "utf-8")
    lines = (
        "/temperature 0.3", "/top_p 0.5", "/top_k 3", "/max_new_tokens 9", "/repetition_penalty 1.2", "/seed 7",
        "/adapter style", "/strength 0.5", f"/tools {tools}", "x",
        "/temperature default", "/adapter base", "/tools off", "y",
    )  # fmt: skip
    session, _ = talk([], *lines, adapters=[AdapterChoice("style", "prefix")])
    first, second = asked(session)
    assert first["sampling"] is session.sampling
    assert first["adapter"] == "style"
    assert first["strength"] == 0.5
    assert first["tools"][0]["name"] == "weather"
    assert session.sampling == {
        "top_p": 0.5,
        "top_k": 3,
        "max_new_tokens": 9,
        "repetition_penalty": 1.2,
        "seed": 7,
    }
    assert (second["adapter"], second["strength"], second["tools"]) == ("", 1.0, ()), "a base has no strength"
    assert session.strengths == {"prefix": 0.5}, "it is there again with the next prefix"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temperature -1", "`temperature` is -1.0, but it must be from 0 to 100"),
        ("/temperature nan", "`temperature` is nan"),
        ("/temperature warm", "`/temperature` is `warm`, but it must be a number"),
        ("/top_k 1.5", "`/top_k` is `1.5`, but it must be a whole number"),
        ("/adapter nothing", "`nothing`.*Valid: style, law"),
        ("/strength 99", "99.*from 0 .* to 10"),
        ("/strength 0.5", "none is chosen"),
        ("/tools missing.json", r"`missing\.json` cannot be read"),
        ("/load missing.json", r"`missing\.json` cannot be read"),
        ("/save", "needs the name of a file"),
        ("/load", "needs the name of a file"),
        ("/edit 3", "There is no question 3: 0 were asked"),
        ("/edit x", "must be a whole number"),
        ("/undo", "no question"),
        ("/retry", "no answer"),
    ],
)
def test_commands_that_cannot_be_obeyed_say_the_way_out(
    line: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    choices = [AdapterChoice("style", "prefix"), AdapterChoice("law", "lora")]
    session, _ = talk([], line, "still here", adapters=choices)
    out = capsys.readouterr().out
    assert re.search(message, out), out
    assert texts(session)[0] == "still here"


def test_a_strength_is_of_what_is_chosen_and_some_models_know_no_tools(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "a"}]', "utf-8")
    choices = [AdapterChoice("law", "lora"), AdapterChoice("any", "")]
    words = (
        "/strength 0.2",
        "/adapter law",
        "/strength 0.5",
        f"/tools {tools}",
        "/adapter any",
        "/strength 0.4",
    )
    session, _ = talk([], *words, adapters=choices, tools=False)
    out = capsys.readouterr().out
    assert "and none is chosen" in out
    assert "strength: 0.5" in out
    assert session.strengths == {"lora": 0.5}
    assert "the server does not say that `any` is one" in out
    assert session.strength == 1.0
    assert "scripted knows no tools" in out


def test_saved_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.json"
    session, _ = talk(
        [said("a")], "/system 短", "x", f"/save {file}", "clear", "/system off", f"/load {file}"
    )
    assert texts(session) == ["短", "x", "a"]
    assert "2 messages" in capsys.readouterr().out


def test_history_and_help_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    talk([called("weather", '{"a": 1}'), said("好\n的")], "x", "晴", "/history", "/help")
    out = capsys.readouterr().out
    assert "1 you: x" in out
    assert 'model: calls weather {"a": 1}' in out
    assert "result: 晴" in out
    assert "model: 好\n     的" in out
    assert "/temperature X" in out


def test_nothing_a_model_says_is_an_order_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    script = [*said(HOSTILE)]
    talk([script, called("a\x1b[31m", '{"\x07": 1}')], "x", "\x1b[2Jy", "", "/history")
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\x00"} & set(out)
    assert "[bold]red[/bold]" in out
    assert ":smile:" in out
    assert "\\u001b[2J" in out
