"""`predict` and `data check` see what a run was trained on: lengths, columns, texts before the question."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from glmtune.cli import main

LONG = "写一段话介绍这件衣服，要说到颜色、面料和穿的场合。" * 5  # more than the 64 tokens of old defaults


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Rows whose columns no layout knows, and runs on them, one per way of tuning."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [
        {"ask": f"{number}{LONG}{'长' * number}", "say": f"{number}件衣服很好看。", "note": "x"}
        for number in range(12)
    ]
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    for tune in ("ptuning", "lora", "full"):
        assert (
            main(
                ["train", f"+recipe={tune}", *files(folder), *COLUMNS, *SHORT, f"output_dir={folder / tune}"]
            )
            == 0
        )
    return folder


COLUMNS = ["data.prompt_column=ask", "data.response_column=say"]
SHORT = ["retention=null", "trainer.max_steps=1", "trainer.save_steps=1", "trainer.per_device_train_batch_size=2",
         "data.source_prefix='新：'", "data.system='友好。'", "trainer.gradient_accumulation_steps=1"]  # fmt: skip


def files(folder: Path) -> list[str]:
    return ["data=files", f"data.train_file={folder / 'rows.json'}"]


def predict(folder: Path, out: Path, *more: str) -> dict:
    asked = ["data=files", f"data.test_file={folder / 'rows.json'}", "data.max_predict_samples=2"]
    assert main(["predict", *asked, "generation.max_new_tokens=2", f"output_dir={out}", *more]) == 0
    return json.loads((out / "predict_config.json").read_text(encoding="utf-8"))


def tuned(place: Path, how: str) -> str:
    return {"ptuning": f"prefix_path={place / how}", "lora": f"adapter_path={place / how}",
            "full": f"model.source={place / how / 'last'}"}[how]  # fmt: skip


@pytest.mark.parametrize("how", ["ptuning", "lora", "full"])
def test_predict_asks_as_the_run_was_trained(place: Path, tmp_path: Path, capsys, how: str) -> None:
    results = json.loads((place / how / "all_results.json").read_text(encoding="utf-8"))
    trained = results["trained_with"]
    assert trained["max_source_length"] > 128, "by the data"
    found = predict(place, tmp_path / "out", tuned(place, how))
    assert found["max_source_length"] == trained["max_source_length"]
    assert found["max_target_length"] == trained["max_target_length"]
    assert found["source_prefix"] == "新："
    answers = (tmp_path / "out" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert "友好。" in json.loads(answers[0])["prompt"]
    said = capsys.readouterr().out
    assert "as in the training of" in said
    assert f"data.max_source_length={trained['max_source_length']}" in said
    assert "data.prompt_column=ask" in said
    assert "2 rows; nothing cut; not read: 1 (note)" in said
    answered = json.loads((tmp_path / "out" / "predict_results.json").read_text(encoding="utf-8"))
    assert (answered["unseen"]["rows_with_cut_question"], answered["unseen"]["unused_columns"]) == (
        0,
        ["note"],
    )


def test_what_is_given_wins(place: Path, tmp_path: Path, capsys) -> None:
    found = predict(place, tmp_path / "out", tuned(place, "ptuning"), "data.max_source_length=64")
    assert found["max_source_length"] == 64
    assert found["source_prefix"] == "新："
    said = capsys.readouterr().out
    assert "data.max_source_length=64 is given (the run had" in said
    assert "2 (100.0 %) lose the question's end" in said


def test_a_file_alone_is_read_with_the_columns_of_the_run(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No data set is named, so the one of the default configuration does not say how the file is laid out."""
    monkeypatch.chdir(tmp_path)
    rows = [{"问题": f"{n} + 1 = ?", "答案": str(n + 1)} for n in range(8)]
    Path("行.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    columns = ["data.prompt_column=问题", "data.response_column=答案"]
    words = ["ptuning", "data=行.jsonl", *columns, f"model.source={tiny_base}", "output_dir=输出"]
    assert main(["train", *words, "--max_steps", "1", "retention=null", "prefix.pre_seq_len=2"]) == 0
    asked = ["prefix_path=输出", f"model.source={tiny_base}", "data.test_file=行.jsonl"]
    assert main(["predict", *asked, "data.max_predict_samples=2", "output_dir=答"]) == 0
    assert "data.prompt_column=问题" in capsys.readouterr().out
    said = [
        json.loads(line) for line in Path("答/generated_predictions.jsonl").read_text("utf-8").splitlines()
    ]
    assert [row["reference"] for row in said] == ["1", "2"]


def test_answers_may_be_as_long_as_those_of_the_run(place: Path, tmp_path: Path) -> None:
    asked = ["data=ads", "data.max_predict_samples=1", tuned(place, "lora"), f"output_dir={tmp_path}"]
    assert main(["predict", *asked]) == 0
    found = json.loads((tmp_path / "predict_config.json").read_text(encoding="utf-8"))
    assert found["generation"]["max_new_tokens"] == found["max_target_length"] == 16, "not the 128 of ads"


def test_a_prefix_file_alone_knows(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "ptuning" / "last" / "prefix_encoder.safetensors", tmp_path)
    found = predict(place, tmp_path / "out", f"prefix_path={tmp_path / 'prefix_encoder.safetensors'}")
    assert found["max_source_length"] > 128


def test_a_base_follows_its_own_data(place: Path, tmp_path: Path, capsys) -> None:
    found = predict(place, tmp_path / "out", *COLUMNS)
    assert found["max_source_length"] > 128
    assert f"data.max_source_length={found['max_source_length']}" in capsys.readouterr().out


def test_numbers_are_kept_with_the_run(place: Path) -> None:
    run = place / "ptuning"
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["data"]["max_source_length"] is None, "as asked for"
    manifest = json.loads((run / "last" / "checkpoint.json").read_text(encoding="utf-8"))
    card = (run / "README.md").read_text(encoding="utf-8")
    assert (
        f"{manifest['trained_with']['max_source_length']}, {manifest['trained_with']['max_target_length']} tokens"
        in card
    )
    assert "12 rows; nothing cut; not read: 1 (note)" in card


def test_a_run_goes_on_with_the_lengths_it_began_with(place: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "lora", run)
    line = ["train", "+recipe=lora", *files(place), *COLUMNS, *SHORT, f"output_dir={run}", "trainer.max_steps=2",
            "resume=force"]  # fmt: skip
    trained = json.loads((run / "last" / "checkpoint.json").read_text(encoding="utf-8"))["trained_with"]
    shorter = tmp_path / "short.json"
    shorter.write_text(json.dumps([{"ask": f"q{n}", "say": "a"} for n in range(4)]), encoding="utf-8")
    assert main([*line, f"data.train_file={shorter}"]) == 0
    again = json.loads((run / "last" / "checkpoint.json").read_text(encoding="utf-8"))
    assert (again["step"], again["trained_with"]) == (2, trained)
    capsys.readouterr()
    same = f"data.max_source_length={trained['max_source_length']}"
    assert main([*line[:-1], f"data.train_file={shorter}", same]) == 0, "the same in numbers is no change"
    assert main([*line[:-1], f"data.train_file={shorter}", "data.max_source_length=40"]) == 2
    assert f"`data.max_source_length`: {trained['max_source_length']} then, 40 now" in capsys.readouterr().err


def test_data_check_sees_what_a_run_sees(place: Path, tmp_path: Path, capsys) -> None:
    def checked(*words: str) -> dict:
        assert main(["data", "check", *words, f"report_file={tmp_path / 'r.json'}"]) == 0
        return json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))

    trained = json.loads((place / "lora" / "all_results.json").read_text(encoding="utf-8"))["trained_with"]
    assert checked(f"run={place / 'lora'}")["max_source_length"] == trained["max_source_length"]
    assert checked(f"run={place / 'full' / 'last'}")["splits"][0]["columns"] == ["ask", "say"]
    for how in ("ptuning", "lora"):
        assert checked(*files(place), tuned(place, how))["max_source_length"] == trained["max_source_length"]
    assert checked(f"run={place / 'lora'}", "data.max_source_length=70")["max_source_length"] == 70
    report = checked("+recipe=ptuning_chat", *files(place), *COLUMNS)
    assert (report["max_source_length"], report["max_target_length"]) == (256, 256), "the recipe's"
    report = checked("+recipe=ptuning", *files(place), *COLUMNS)
    assert report["chosen_lengths"]
    assert report["max_source_length"] == report["wanted_source_length"]
    capsys.readouterr()
    assert main(["data", "check", f"run={tmp_path}"]) == 2
    assert "cannot be read as the settings of a run" in capsys.readouterr().err
    assert main(["data", "check", f"run={place}", f"prefix_path={place}"]) == 2
    assert "Leave one out" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["ptuning", "full"])
def test_eval_asks_with_the_template_and_system_message_of_the_run(
    place: Path, tmp_path: Path, capsys, how: str
) -> None:
    line = [
        "eval",
        "benchmark=ceval",
        "benchmark.limit=1",
        "benchmark.subjects=[high_school_biology]",
        tuned(place, how),
    ]
    assert main([*line, f"output_dir={tmp_path / 'as'}"]) == 0
    said = capsys.readouterr().out
    assert "as in the training: is_chat=true, its system message, '友好。'" in said
    assert "data.source_prefix='新：' is left out" in said
    assert main([*line, f"output_dir={tmp_path / 'own'}", "is_chat=false"]) == 0
    assert "is_chat=true" not in capsys.readouterr().out
