"""The parts of the page that need no browser."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time

import pytest

from glmtune.errors import ConfigError, DataError, GlmtuneError, MissingExtraError
from glmtune.inference.requests.chat import TextDelta
from glmtune.interactive.answerer import AnswerStream
from glmtune.interactive.conversation import Conversation
from glmtune.interactive.web import login as login_module
from glmtune.interactive.web.answering import Answering
from glmtune.interactive.web.chats import MAX_KEPT_BYTES, Chat, read_chat, read_chats, with_chat
from glmtune.interactive.web.login import read_login
from glmtune.interactive.web.safe_markdown import APART, code_span, fenced, plain, safe_markdown
from glmtune.interactive.web.settings import WebSettings
from glmtune.interactive.web.words import CHINESE, ENGLISH


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a < b and c<d", "a < b and c<|d"),
        ("<b>x</b>", "<|b>x<|/b>"),
        ("<!-- x --> <?php", "<|!-- x --> <|?php"),
        ("`<b>` <b>", "`<b>` <|b>"),
        ("``a ` <b>`` <b>", "``a ` <b>`` <|b>"),
        ("`open <b>", "`open <|b>"),
        ("`a\n\n<b>`", "`a\n\n<|b>`"),
        ("```\n<b>\n```\n<b>", "```\n<b>\n```\n<|b>"),
        ("```html\n<b>\n``\n<b>", "```html\n<b>\n``\n<b>"),
        ("~~~\n```\n<b>\n~~~\n<b>", "~~~\n```\n<b>\n~~~\n<|b>"),
        ("1. x\n   ```\n   <b>\n   ```\n<b>", "1. x\n   ```\n   <b>\n   ```\n<|b>"),
        ("![a](http://x)", "!|[a](http://x)"),
        ("costs $5 and $6", "costs $5 and $6"),
        ("so $x_1$ is", r"so \(x_1\) is"),
        ("`$x$`", "`$x$`"),
    ],
)
def test_no_tag_is_left_outside_of_code(text: str, shown: str) -> None:
    assert safe_markdown(text) == shown.replace("|", APART)
    if "$" not in text:
        assert plain(safe_markdown(text)) == text


def test_code_cannot_be_broken_out_of() -> None:
    assert fenced("a ``` b\n````\n<b>").startswith("`````\n")
    assert code_span("a`b") == "`` a`b ``"
    assert code_span("get\n_weather") == "`get _weather`"


def test_every_word_is_there_in_both_languages() -> None:
    for item in dataclasses.fields(ENGLISH):
        ours, theirs = getattr(ENGLISH, item.name), getattr(CHINESE, item.name)
        assert isinstance(ours, str)
        assert theirs or item.name == "path"
        assert ("{name}" in ours) == ("{name}" in theirs), item.name


def test_who_may_log_in(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(login_module, "FAILURE_SECONDS", 0.0)
    monkeypatch.delenv("GLMTUNE_WEB_USERS", raising=False)
    assert read_login(None) is None
    monkeypatch.setenv("GLMTUNE_WEB_USERS", "ann:a,bob:b:c")
    found = read_login(None)
    assert found is not None

    async def checks() -> list[bool]:
        pairs = [("ann", "a"), ("bob", "b:c"), ("ann", "b"), ("eve", "a"), ("", "")]
        return [await found.check(user, password) for user, password in pairs]

    assert asyncio.run(checks()) == [True, True, False, False, False]
    file = tmp_path / "users"
    file.write_text("ann:a\nsecret-without-user\n")
    with pytest.raises(ConfigError, match="line 2 must be `USER:PASSWORD`") as error:
        read_login(str(file))
    assert "secret" not in str(error.value).replace("secret-file", "")
    file.write_text("\n# nobody\n")
    with pytest.raises(ConfigError, match="names nobody"):
        read_login(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_login(str(tmp_path / "none"))


def test_settings_say_what_is_wrong() -> None:
    for values, words in (
        ({"server_port": 70000}, "`server_port` is 70000"),
        ({"server_name": " "}, "`server_name` is empty"),
        ({"language": "fr"}, "`language` is `fr`"),
        ({"allowed_hosts": ["http://x"]}, "without scheme"),
        ({"max_answers": 0}, "`max_answers` is 0"),
    ):
        with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
            WebSettings(**values)
    assert WebSettings().hosts == ["localhost", "127.0.0.1", "::1"]
    assert WebSettings(server_name="0.0.0.0").hosts is None


def test_without_gradio_it_says_what_to_install(monkeypatch) -> None:
    import sys

    from glmtune.interactive.web.serve import prepare

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"glmtune\[web\]"):
        prepare()


def test_a_taken_port_is_said(capsys) -> None:
    from glmtune.cli import main

    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["web", f"server_port={port}"]) == 2
    assert f"`server_port` is {port}, but another process listens" in capsys.readouterr().err


def talk(*texts: str) -> Conversation:
    turns = [
        {"role": "user" if place % 2 == 0 else "assistant", "content": text}
        for place, text in enumerate(texts)
    ]
    return Conversation("", turns)


def test_a_browsers_chat_is_read_with_caution() -> None:
    chat = Chat(talk("q", "a"))
    assert read_chat(chat.stored()).main.turns == chat.main.turns
    for damaged in (
        None,
        [],
        {"messages": 3},
        {"messages": [{"role": "x"}]},
        {"messages": [{"role": "user"}]},
    ):
        assert read_chat(damaged).main.turns == []
    assert read_chat(chat.stored() | {"id": "../x"}).id != "../x"
    assert read_chats([{"id": 1}, chat.stored(), 3]) == [chat.stored()]


def test_the_newest_chats_are_kept_as_far_as_there_is_room() -> None:
    old = [Chat(talk(str(number), "x" * (MAX_KEPT_BYTES // 3))).stored() for number in range(5)]
    kept = with_chat(old, Chat(talk("new", "a")))
    assert [item["title"] for item in kept] == ["new", "0", "1"]
    huge = Chat(talk("huge", "x" * MAX_KEPT_BYTES))
    assert [item["title"] for item in with_chat(old, huge)] == ["huge"]


def test_both_conversations_change_alike() -> None:
    chat = Chat(talk("q", "a"))
    chat.ask("r", compares=True)
    assert [turn["content"] for turn in chat.compared().turns] == ["q", "a", "r"]
    chat.edit(0, "s", compares=True)
    assert chat.compared().turns == chat.main.turns == talk("s").turns
    with pytest.raises(GlmtuneError, match="no such question"):
        chat.edit(1, "t", compares=False)
    with pytest.raises(DataError, match="no valid JSON"):
        Conversation.from_json("{")


def test_an_answer_that_waits_for_its_first_word_is_stopped_at_once() -> None:
    cancelled = []
    stream = AnswerStream(lambda: cancelled.append(True))

    async def run() -> Answering:
        answering = Answering([lambda: stream])
        asyncio.get_running_loop().call_later(0.1, answering.stop)
        async for _ in answering.changes():
            pass
        return answering

    answering = asyncio.run(run())
    assert answering.parts[0].finished.reason == "cancelled"
    until = time.monotonic() + 10
    while not cancelled and time.monotonic() < until:
        time.sleep(0.01)
    assert cancelled == [True]


def test_one_of_two_answers_that_fails_leaves_the_other() -> None:
    def fails() -> AnswerStream:
        raise GlmtuneError("full")

    stream = AnswerStream()
    stream.put(TextDelta("part"))
    stream.put(GlmtuneError("broke"))

    async def run() -> Answering:
        answering = Answering([fails, lambda: stream])
        async for _ in answering.changes():
            pass
        return answering

    answering = asyncio.run(run())
    assert answering.error in ("full", "broke")
    assert [parts.text for parts in answering.parts] == ["", "part"]
    assert {parts.finished.reason for parts in answering.parts} == {"failed"}
