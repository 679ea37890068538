"""Text of files, models and servers on its way to a terminal: shown, never obeyed; files keep it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmtune.cli import main
from glmtune.inference.predict.predictions import Prediction
from glmtune.inference.predict.report import samples_table
from glmtune.tables import TextTable
from glmtune.terminal.console import Console, Progress
from glmtune.terminal.text import shown

ORDERS = (
    "\x1b]0;a title\x07",
    "\x1b]52;c;cm0gLXJmIH4=\x07",
    "\x1b[2J\x1b[1;1H",
    "\x9b31m",
    "\x9d0;title\x9c",
    "\x90qsixel\x1b\\",
    "all is well\rsome",
    "ok\b\b",
    "\x7f",
    "\x85",
    "\u202egnp.exe",
    "\u2066isolate\u2069",
    "[bold]b[/bold] [link=https://example.org]x[/link] [/] [/red] :warning:",
    "\ud83d",
)
HOSTILE = "text ".join(ORDERS)
# Everything that a terminal obeys, line feed and tab left out.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def assert_harmless(text: str) -> None:
    found = OBEYED.search(text)
    assert found is None, f"{found!r} in {text[max(0, found.start() - 40) : found.end() + 40]!r}"


@given(st.text(st.characters() | st.sampled_from("".join(ORDERS))))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_shown_text_is_harmless_and_nothing_else_changes(text: str) -> None:
    assert_harmless(shown(text))
    plain = "".join(
        character for character in text if not OBEYED.match(character) and character not in "\u2028\u2029"
    )
    assert re.sub(r"\\u[0-9a-f]{4}", "", shown(plain)) == re.sub(r"\\u[0-9a-f]{4}", "", plain)
    assert shown(shown(text)) == shown(text)


def test_json_on_a_terminal_still_says_the_same() -> None:
    text = json.dumps(HOSTILE, ensure_ascii=False)
    assert json.loads(shown(text)) == HOSTILE
    assert_harmless(shown(text))


@pytest.mark.parametrize("order", ORDERS)
def test_console_obeys_nothing(order: str) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=60, highlight=False)
    console.print(order, f"[yellow]{order}", soft_wrap=True)
    TextTable(order, (order, order), ((order, order),), order).show(console)
    console.print(samples_table([Prediction(row=0, prediction=order, reference=order, prompt=order)]))
    said = stream.getvalue()
    assert_harmless(said)
    if "[" in order and "\x1b" not in order and "\x9b" not in order:
        assert order in said, "markup is text"


def test_progress_bars_move_the_cursor_but_their_words_do_not() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=True, color_system=None)
    with Progress(console=console) as bar:
        bar.update(bar.add_task(f"[/] {HOSTILE}", total=2), advance=1)
    said = stream.getvalue()
    assert "\x1b[?25l" in said, "rich hides the cursor itself"
    assert_harmless(re.sub("\x1b\\[[?0-9;]*[A-Za-z]|\r", "", said))
    assert "[/]" in said
    assert "\x1b]" not in said


def test_logs_warnings_and_traces_are_guarded(tmp_path: Path) -> None:
    """In a process of its own, as the guard is for a whole process."""
    program = tmp_path / "program.py"
    program.write_text(
        "import logging, sys, threading, warnings\n"
        "from glmtune.terminal.text import guard_output\n"
        "guard_output()\n"
        f"hostile = {HOSTILE!r}\n"
        "sys.stdout.write('\\u65e5\\n')\n"  # no character of Latin-1
        "logging.getLogger('some.library').warning('said %s', hostile)\n"
        "warnings.warn(hostile)\n"
        "try:\n    raise ValueError(hostile)\n"
        "except ValueError:\n    logging.getLogger('x').exception('failed')\n"
        "def fail():\n    raise OSError(hostile)\n"
        "thread = threading.Thread(target=fail)\nthread.start()\nthread.join()\n"
        "raise RuntimeError(hostile)\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, program], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 1
    assert done.stdout.decode("latin-1") == "\\u65e5\n"
    error = done.stderr.decode("latin-1")
    for words in ("said text", "UserWarning", "ValueError", "OSError", "RuntimeError"):
        assert words.split()[0] in error, words
    assert_harmless(error)


def hostile_rows(path: Path) -> Path:
    row = {"content": f"问 {HOSTILE}", "summary": f"答 {HOSTILE}", f"col {HOSTILE}": HOSTILE}
    lines = [json.dumps(row), json.dumps({**row, "summary": 3}), json.dumps({"content": HOSTILE})]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("extra", [[], ["data.on_bad_row=skip"], ["data.layout=openai"]])
def test_data_check_of_a_hostile_file(extra: list[str], tmp_path: Path, capfd, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path = hostile_rows(tmp_path / "rows.jsonl")
    report = tmp_path / "report.json"
    words = ["data", "check", "data=files", f"data.train_file={path}", f"report_file={report}", *extra]
    assert main(words) in (0, 1)
    said = capfd.readouterr()
    assert "\\u001b" in said.out + said.err
    assert_harmless(said.out)
    assert_harmless(said.err)
    if not extra:
        kept = json.loads(report.read_text(encoding="utf-8"))["splits"][0]["unused_columns"][0]
        assert kept == f"col {HOSTILE}", "files keep what was there"


def test_names_given_by_hand_are_shown_too(tmp_path: Path, capfd) -> None:
    name = tmp_path / "no\x1b]0;x\x07such[/].jsonl"
    assert main(["train", "+recipe=ptuning", "data=files", f"data.train_file='{name}'"]) == 1
    assert main(["\x1b[2J"]) == 2
    said = capfd.readouterr()
    assert "\\u001b]0;x" in said.err
    assert_harmless(said.out + said.err)


def test_composed_settings_are_yaml_that_reads_back(capfd) -> None:
    import yaml

    assert main(["train", "+recipe=ptuning", "data.source_prefix='a\u202eb\x85c'", "--cfg"]) == 0
    said = capfd.readouterr().out
    assert_harmless(said)
    assert yaml.safe_load(said)["data"]["source_prefix"] == "a\u202eb\x85c"


def test_scores_of_hostile_predictions(tmp_path: Path, capfd) -> None:
    folder = tmp_path / "[bold]\x1b[31m run[/]"
    folder.mkdir(parents=True)
    path = folder / "generated_predictions.jsonl"
    rows = [{"row": 0, "prompt": HOSTILE, "prediction": HOSTILE, "reference": "答"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    main(["score", f"predictions='{path}'"])
    said = capfd.readouterr()
    assert "[bold]" in said.out + said.err
    assert_harmless(said.out + said.err)


def test_answers_of_a_model_are_shown(tmp_path: Path, capfd, monkeypatch) -> None:
    """A whole `predict` whose model answers with orders: the terminal shows them, the file keeps them."""
    from glmtune.models.tokenizers.chatglm2_and_3 import SentencePieceGlmTokenizer

    answer = HOSTILE.replace("\ud83d", "")
    monkeypatch.setattr(SentencePieceGlmTokenizer, "_ids_to_text", lambda self, ids: answer)
    monkeypatch.setenv("COLUMNS", "100")
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"content": answer, "summary": answer}) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    words = ["predict", "model=glm-tiny", "data=files", f"data.test_file={path}", f"output_dir={out}"]
    assert main([*words, "generation.max_new_tokens=3"]) == 0, capfd.readouterr().err
    said = capfd.readouterr()
    assert "\\u001b]52;c" in said.out
    assert_harmless(said.out + said.err)
    kept = next(out.rglob("generated_predictions.jsonl")).read_text(encoding="utf-8")
    assert "52;c" in json.loads(kept.split("\n")[0])["prediction"]
