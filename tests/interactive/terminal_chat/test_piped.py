"""A pipe: lines in, answers out, and nothing else."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glmtune.interactive.terminal_chat.piped import questions, run_piped, standard_input
from glmtune.interactive.terminal_chat.session import Session
from tests.interactive.scripted import ScriptedAnswerer, called, said
from tests.warm.start import warm_python

WORDS = ["-m", "glmtune", "chat", "temperature=0", "max_new_tokens=12"]


def test_every_line_is_a_turn(capsys: pytest.CaptureFixture[str]) -> None:
    answerer = ScriptedAnswerer([said("您好"), said("a\x1bb")])
    run_piped(Session(answerer), ["你好\n", "\n", "stop\n"])
    assert capsys.readouterr() == ("您好\na\\u001bb\n", "")
    assert [turn["content"] for turn in answerer.asked[1]["messages"]] == ["你好", "您好", "stop"]


def test_a_call_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    run_piped(Session(ScriptedAnswerer([called("weather", '{"city": "北京"}')])), ["天气"])
    assert json.loads(capsys.readouterr().out) == {
        "tool_calls": [{"name": "weather", "arguments": '{"city": "北京"}'}]
    }


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a\\\n", "b\n"], ["a\nb"]),
        (["a\\\\\n", "b"], ["a\\\\", "b"]),
        (["a\\\n"], ["a"]),
        (["a\r\n", "  \n", "\t\n"], ["a"]),
        ([], []),
    ],
)
def test_lines_that_go_on(lines: list[str], expected: list[str]) -> None:
    assert list(questions(lines)) == expected


def test_bytes_that_are_no_text_and_a_mark_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\xff\nb")))
    assert list(standard_input()) == ["a\ufffd\n", "b"]


def run(text: str, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, input=text, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120
    )


def test_the_command_answers_lines_and_says_nothing_else(tmp_path: Path) -> None:
    done = run("你好\n你好\n", sys.executable, *WORDS, cwd=tmp_path, HOME=str(tmp_path))
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (0, "", 2)
    assert lines[0].startswith("你好")
    assert not list(tmp_path.iterdir()), "nothing is written by a pipe"


def test_an_empty_pipe_is_fine_and_wrong_settings_are_not(tmp_path: Path) -> None:
    assert run("", *warm_python(), *WORDS, cwd=tmp_path).returncode == 0
    refused = run("", *warm_python(), *WORDS, "prefix_strength=0.5", cwd=tmp_path)
    assert refused.returncode == 2
    assert "`prefix_strength` is 0.5, but no prefix was loaded" in refused.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*warm_python(), *WORDS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write("你好\n".encode())
    process.stdin.flush()
    assert process.stdout.read(1)
    process.stdout.close()
    process.stdin.write("你好\n你好\n".encode())
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
