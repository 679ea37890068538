"""`glmtune data check` from the command line: what is shown, written and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.data.reading.shipped import resolve_shipped
from recipes.data import COMMAND
from recipes.words.compose import load_settings

TOKENIZER = Path(__file__).resolve().parents[2] / "glmtune" / "assets" / "glm-tiny" / "tokenizer.model"


@pytest.fixture(autouse=True)
def _needs_the_embedded_tokenizer(tmp_path, monkeypatch) -> None:
    if not TOKENIZER.is_file():
        pytest.skip("the embedded model is not built yet: `glmtune train +recipe=pretrain_tiny`")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("GLMTUNE_DATA", raising=False)


def rows(path: Path, pairs: list[tuple[object, object]]) -> str:
    path.write_text(json.dumps([{"content": q, "summary": a} for q, a in pairs], indent=1), encoding="utf-8")
    return str(path)


def test_check_of_the_shipped_data(capsys, tmp_path) -> None:
    assert main(["data", "check", f"report_file={tmp_path / 'out' / 'report.json'}"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "adgen (content, summary)",
        "train ∩ validation: 0 of",
        "the same file as validation",
        "⟦loss⟧",
        "</s>⟧",
    ):
        assert words in shown, shown
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    lines = resolve_shipped("shipped:ads/train.jsonl").read_text(encoding="utf-8").splitlines()
    assert report["splits"][0]["num_rows"] == len(lines)
    assert [split["num_bad_rows"] for split in report["splits"]] == [0, 0]
    assert [split["num_duplicates"] for split in report["splits"]] == [0, 0]


def test_colours_mark_the_loss(capsys, monkeypatch) -> None:
    for name in ("NO_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert main(["data", "check", "data.max_train_samples=3", "data.max_eval_samples=3"]) == 0
    assert "\x1b[1;32m⟦" in capsys.readouterr().out


def test_bad_rows_are_listed_and_fail(capsys, tmp_path) -> None:
    path = rows(tmp_path / "mine.json", [("颜色#白", "白色的裙子。"), ("颜色#黑", ""), ("颜色#红", ["红"])])
    assert main(["data", "check", "data=files", f"data.train_file={path}"]) == 1
    captured = capsys.readouterr()
    assert "line 6: `summary` (the answer) is empty" in captured.out
    assert "line 10: `summary` (the answer) must be a string" in captured.out
    assert "2, of them 1 with an empty answer" in captured.out
    assert "2 rows cannot be used" in captured.err
    assert main(["data", "check", "data=files", f"data.train_file={path}", "data.on_bad_row=skip"]) == 0


@pytest.mark.parametrize(
    ("overrides", "code", "words"),
    [
        (["chek"], 2, ["`action` is `chek`", "Did you mean `check`"]),
        (["data=files"], 2, ["`data.train_file` is not set"]),
        (["data=files", "data.train_file=mien.json"], 1, ["mien.json", "no such file", "mine.json"]),
        (["data=files", "data.train_file=mine.json", "data.prompt_column=q", "data.response_column=a"], 1,
         ["the column `q` does not occur", "content, summary"]),
        (["data=adgen"], 1, ["found in none of these places", "GLMTUNE_DATA"]),
        (["data.max_source_lenght=9"], 2, ["data.max_source_lenght", "Did you mean `data.max_source_length`"]),
        (["report_file=mine.json/x.json", "data.max_train_samples=2"], 2, ["`report_file` is `mine.json/x.json`", "writable"]),
        (["data=files", "data.train_file=mine.json", "data.max_source_length=4"], 1, ["max_source_length` = 4"]),
    ],
)  # fmt: skip
def test_wrong_use(overrides: list[str], code: int, words: list[str], tmp_path, capsys) -> None:
    rows(tmp_path / "mine.json", [("q", "a")])
    assert main(["data", *overrides]) == code
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["ads", "adgen", "chat", "files"])
def test_data_configs_compose(name: str) -> None:
    settings = load_settings(COMMAND, [f"data={name}"])
    assert settings.data.packing is False
    assert (settings.data.name == "adgen") == (name == "adgen")


def test_adgen(benchmarks_data, capsys, monkeypatch) -> None:
    monkeypatch.setenv("GLMTUNE_DATA", str(benchmarks_data))
    assert (
        main(["data", "check", "data=adgen", "data.max_train_samples=200", "data.max_eval_samples=100"]) == 0
    )
    shown = capsys.readouterr().out
    assert f"{benchmarks_data}/adgen/train.json (jsonl, utf-8)" in shown
    assert "0 of 100 prompts" in shown
