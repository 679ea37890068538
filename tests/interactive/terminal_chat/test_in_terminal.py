"""`glmtune chat` itself in a pseudo-terminal: what is typed, what a screen shows, how it ends."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from tests.interactive.pseudo_terminal import Terminal, chat
from tests.interactive.scripted_server import delta, end, scripted_server, sse

READY = r"\n> ?$"
"""The prompt, and nothing typed yet."""
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]")


def test_a_chat_with_the_embedded_model(tmp_path: Path) -> None:
    with Terminal(chat("temperature=0", "max_new_tokens=400", "--system", "简短"), home=tmp_path) as terminal:
        greeting = terminal.until(READY)
        assert "glm-tiny on cpu; temperature 0.0; top_p 0.8 (default)" in greeting
        assert "`stop` leaves" in greeting
        terminal.type("你好\r")
        answer = terminal.until(r"tokens/s\]")
        assert "你好" in answer.splitlines()[1]
        terminal.until(READY)
        # Random words do not end by themselves.
        terminal.type("/temperature 50\r")
        terminal.until("temperature: 50.0")
        terminal.until(READY)
        terminal.type("/top_p 1\r")
        terminal.until("top_p: 1.0")
        terminal.until(READY)
        terminal.type("第一行\\\r第二行\x1b\r第三行\r")
        terminal.until_answering()
        terminal.until(r"\w")
        terminal.type("\x03")
        terminal.until(r"\[stopped\]")
        terminal.until(READY)
        terminal.type("/history\r")
        history = terminal.until(READY)
        assert "system: 简短" in history
        assert "2 you: 第一行\n     第二行\n     第三行" in history
        assert re.search(r"第三行\n  model: .*\w", history), "what came is kept"
        terminal.type("clear\r")
        terminal.until("begins anew")
        assert b"\x1b[2J" in terminal.raw or b"\x1b[H" in terminal.raw
        terminal.until(READY)
        terminal.type("/history\r")
        assert "2 you" not in terminal.until(READY)
        terminal.type("stop\r")
        assert terminal.end() == 0
    kept_words = (tmp_path / ".local/state/glmtune/chat_history").read_text("utf-8")
    assert "+第一行\n+第二行\n+第三行" in kept_words


def scripted(home: Path) -> Terminal:
    repository = Path(__file__).resolve().parents[3]
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from tests.interactive.scripted import main; main()"
    )
    return Terminal([sys.executable, "-c", program, str(repository)], home=home)


def test_what_a_model_says_does_not_reach_the_terminal_as_orders(tmp_path: Path) -> None:
    with scripted(tmp_path) as terminal:
        terminal.until(r"^> ?$")
        place = len(terminal.raw)
        terminal.type("x\r")
        terminal.until(r"tokens/s\]|tokens\]")
        answer = terminal.raw[place:].decode()
        assert "title" in answer
        assert "\x1b]" not in answer
        assert "\x1b[2J" not in answer
        assert not CONTROL.search(terminal.text)
        terminal.until(READY)
        # Stopped behind the first word, which stays; and before it, at once.
        terminal.type("数\r")
        terminal.until("第一")
        terminal.type("\x03")
        terminal.until(r"\[stopped\]")
        terminal.until(READY)
        terminal.type("again\r")
        terminal.until_answering()
        terminal.type("\x03")
        terminal.until("the Up key brings your words back")
        terminal.until(READY)
        terminal.type("\x1b[A\r")
        shown = terminal.until(r"skips\)> ?$")
        assert 'calls look\\u001b[31m {"a": "\\u009b5m"}' in shown
        terminal.type("结果\r")
        terminal.until("end\n")
        terminal.until(READY)
        terminal.type("\x03")
        terminal.until("once more")
        terminal.until(READY)
        terminal.type("\x03")
        assert terminal.end() == 0


def test_ctrl_d_leaves(tmp_path: Path) -> None:
    with scripted(tmp_path) as terminal:
        terminal.until(r"^> ?$")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_a_server_is_talked_to_and_its_key_not_shown(tmp_path: Path) -> None:
    with scripted_server() as server:
        server.pieces = sse(delta(content="您"), delta(content="好\x1b[31m"), end(), "[DONE]")
        key = {"GLMTUNE_API_KEY": "sk-secret"}
        with Terminal(
            chat(f"url={server.url}", "url_model=style"), environment=key, home=tmp_path
        ) as terminal:
            greeting = terminal.until(READY)
            assert f"glm-tiny at {server.url}; adapter style; temperature as the server decides" in greeting
            terminal.type("/strength 0.5\r")
            terminal.until(READY)
            terminal.type("你好\r")
            terminal.until(r"您好\\u001b\[31m")
            terminal.until(READY)
            terminal.type("quit\r")
            assert terminal.end() == 0
            assert b"sk-secret" not in terminal.raw
        assert server.headers["Authorization"] == "Bearer sk-secret"
        body = server.asked[0]
        assert (body["model"], body["prefix_strength"], "temperature" in body) == ("style", 0.5, False)


@pytest.mark.slow
def test_a_signal_ends_it_with_its_number(tmp_path: Path) -> None:
    with Terminal(chat(), home=tmp_path) as terminal:
        terminal.until(READY)
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM
