"""`glmtune score` on files of both kinds, and on pairs of runs."""

from __future__ import annotations

import json

import pytest

from glmtune.cli import main
from glmtune.errors import ConfigError, DataError
from glmtune.metrics.text import METRICS
from recipes.score import ScoreConfig, run

REFERENCES = [
    f"这条{thing}版型宽松，穿着舒适。" for thing in ("裤子", "裙子", "衬衫", "外套", "毛衣", "风衣")
] * 5
GOOD = [text.replace("舒适", "很舒适") for text in REFERENCES]
POOR = ["好看的衣服百搭" for _ in REFERENCES]


def write_run(folder, predictions, references=REFERENCES, *, fingerprint=None, rows=None):
    folder.mkdir(parents=True)
    rows = range(len(predictions)) if rows is None else rows
    lines = [
        json.dumps({"row": row, "prediction": text, "reference": reference}, ensure_ascii=False)
        for row, text, reference in zip(rows, predictions, references, strict=True)
    ]
    (folder / "generated_predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if fingerprint:
        identity = {"data_fingerprint": fingerprint, "num_rows": 30}
        (folder / "predict_config.json").write_text(json.dumps(identity))
    return folder


def test_scores_of_an_official_file_are_printed_and_written(tmp_path, capsys):
    file = tmp_path / "generated_predictions.txt"
    pairs = zip(["", *GOOD[1:]], REFERENCES, strict=True)
    file.write_text("\n".join(json.dumps({"labels": r, "predict": p}) for p, r in pairs), encoding="utf-8")
    assert main(["score", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "adgen-official" in shown
    assert "1 empty predictions (scored 0)" in shown
    written = json.loads((tmp_path / "score.json").read_text(encoding="utf-8"))
    assert list(written["metrics"]) == list(METRICS)
    bleu = written["metrics"]["bleu-4"]
    assert 0 < bleu["low"] < bleu["value"] < bleu["high"] < 100
    assert bleu["protocol"] == "adgen-official"
    assert written["num_rows"] == 30


def test_run_folder_is_scored_and_a_partial_run_says_so(tmp_path, capsys):
    folder = write_run(tmp_path / "run" / "predict", GOOD[:20], REFERENCES[:20], fingerprint="x")
    result = run(ScoreConfig(predictions=str(tmp_path / "run")))
    assert result.written == folder / "score.json"
    assert result.report is not None
    assert result.report["exact-match"].value == 0
    assert "Partial: 20 of 30 rows" in capsys.readouterr().out


def test_better_run_is_called_better(tmp_path, capsys):
    a = write_run(tmp_path / "a", POOR, fingerprint="f")
    b = write_run(tmp_path / "b", GOOD, fingerprint="f")
    assert main(["score", f"a={a}", f"b={b}"]) == 0
    shown = capsys.readouterr().out
    assert "`b` is better than `a` in bleu-4: +" in shown
    written = json.loads((b / "comparison.json").read_text(encoding="utf-8"))
    assert [item["metric"] for item in written["differences"]] == list(METRICS)
    assert written["differences"][0]["is_significant"] is True


def test_a_run_does_not_differ_from_itself(tmp_path):
    folder = str(write_run(tmp_path / "a", GOOD))
    result = run(ScoreConfig(a=folder, b=folder))
    assert not any(item.is_significant for item in result.differences)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "other"}, r"different data: its data fingerprint is mine, that of .* is other"),
        ({"rows": [*range(29), 40]}, r"same rows: 1 rows are only in .*a/.*\(rows 29\); 1 rows.*\(rows 40\)"),
        (
            {"references": [*REFERENCES[:29], "别的"]},
            r"references differ .* in 1 of 30 rows \(rows 29\).*`别的`",
        ),
    ],
)
def test_runs_on_different_rows_are_refused(tmp_path, change, message):
    a = write_run(tmp_path / "a", GOOD, fingerprint="mine")
    b = write_run(tmp_path / "b", GOOD, **{"fingerprint": "mine", **change})
    with pytest.raises(DataError, match=message):
        run(ScoreConfig(a=str(a), b=str(b)))


def test_rows_without_reference_are_refused(tmp_path):
    folder = write_run(tmp_path / "a", GOOD, [*REFERENCES[:29], None])
    with pytest.raises(DataError, match=r"1 of 30 rows have no reference \(first: row 29\)"):
        run(ScoreConfig(predictions=str(folder)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"`predictions` is not set. Use `predictions=FILE`.*a=RUN1 b=RUN2"),
        ({"a": "x"}, r"`b` is not set"),
        ({"b": "x"}, r"`a` is not set"),
        ({"predictions": "p", "b": "x"}, r"`predictions` and `b` are both set"),
        ({"predictions": "absent"}, r"`predictions` is `absent`, but there is no such file"),
    ],
)
def test_wrong_calls_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        run(ScoreConfig(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, "`seed` is -1.*at least 0"),
        ({"num_resamples": 5}, "`num_resamples` is 5.*at least 100"),
    ],
)
def test_wrong_numbers_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ScoreConfig(**values)
