"""Mixtures, kept rows and streams from the command line: what is shown, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from glmtune.cli import main
from glmtune.data.settings import DataSettings, mixed_sets
from glmtune.errors import ConfigError
from glmtune.training.config import RunConfig
from glmtune.training.settings import TrainerSettings
from glmtune.training.starting.changes import changed_settings


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    rows: dict[str, list[dict[str, Any]]] = {
        "ads": [{"content": f"颜色#{n}", "summary": f"颜色很好{n}。"} for n in range(30)],
        "sums": [{"q": f"{n} + {n}", "a": f"{2 * n}", "note": ""} for n in range(10)],
        "dev": [{"q": f"{n} + {n}", "a": f"{2 * n}"} for n in range(5, 15)],
    }
    found = {name: str(tmp_path / f"{name}.jsonl") for name in rows}
    for name, path in found.items():
        Path(path).write_text("\n".join(map(json.dumps, rows[name])), encoding="utf-8")
    return found


def mix_of(
    files: dict[str, str], weights: tuple[float | None, float | None] = (1, 3)
) -> list[dict[str, Any]]:
    columns = {"prompt_column": "q", "response_column": "a", "layout": "columns"}
    sets: list[dict[str, Any]] = [
        {"name": "ads", "train_file": files["ads"]},
        {"name": "sums", "train_file": files["sums"], "validation_file": files["dev"], **columns},
    ]
    return [
        {**one, **({} if weight is None else {"weight": weight})}
        for one, weight in zip(sets, weights, strict=True)
    ]


def word(mix: list[dict[str, Any]]) -> str:
    return "data.mix=[" + ",".join(f"{{{','.join(f'{k}:{v}' for k, v in one.items())}}}" for one in mix) + "]"


def test_the_check_of_a_mixture_shows_its_sets_apart(files, capsys, tmp_path: Path) -> None:
    words = ["data=files", word(mix_of(files)), f"report_file={tmp_path / 'report.json'}"]
    assert main(["data", "check", *words]) == 0
    shown = capsys.readouterr().out
    for text in (
        "train: ads",
        "train: sums",
        "validation: sums",
        "adgen (content, summary)",
        "columns (q, a); not read: note",
        "10 rows, each 0.333 times",
        "30 rows, each 3 times",
        "train ∩ validation (sums): 5 of 10 prompts",
    ):
        assert text in shown, shown
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    found = [(each["split"], each["mix_name"], each["num_rows"]) for each in report["splits"]]
    assert found == [("train", "ads", 30), ("train", "sums", 10), ("validation", "sums", 10)]
    assert [each["rows_per_epoch"] for each in report["splits"]] == [10, 30, None]


def test_settings_reach_their_set_alone(files) -> None:
    mix = mix_of(files, (None, None))
    mix[1]["system"] = "calculate"
    settings = DataSettings(mix=mix, system="be kind", validation_frac=0.1)
    (_, ads), (_, sums) = mixed_sets(settings)
    assert (ads.layout, ads.system, ads.validation_frac, ads.mix) == ("auto", "be kind", 0.1, None)
    assert (sums.prompt_column, sums.system, sums.validation_frac) == ("q", "calculate", 0.0)
    assert settings.has_validation


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wieght": 2}, r"set 2 \(sums\).*`wieght`.*Did you mean `weight`"),
        ({"weight": -1}, r"`weight` of `sums`.*-1.*above 0"),
        ({"weight": None}, r"gives 1 of 2 sets a weight"),
        ({"name": "ads"}, r"names the sets ads, ads.*two at least"),
        ({"name": "a b"}, r"`data\.mix\[\]\.name` is `a b`"),
        ({"name": "switched"}, r"`switched` is another figure's"),
        ({"train_file": None}, r"`train_file` of `sums` in `data\.mix` is not set"),
        ({"layout": "nothing"}, r"set 2 \(sums\).*`data\.layout`.*`nothing`"),
    ],
    ids=["unknown", "negative", "one weight", "twice", "blank", "taken", "no file", "layout"],
)
def test_a_set_that_is_not_as_it_must_be(files, change: dict[str, Any], words: str) -> None:
    mix = mix_of(files)
    mix[1] |= change
    with pytest.raises(ConfigError, match=words):
        DataSettings(mix=mix)


def test_a_mixture_beside_a_file_or_an_order_is_refused(files) -> None:
    with pytest.raises(ConfigError, match=r"`data\.mix` is given and `data\.train_file` is `x`.*data=files"):
        DataSettings(mix=mix_of(files), train_file="x")
    with pytest.raises(ConfigError, match=r"`data\.mix` is given and `trainer\.shuffle` is false"):
        RunConfig(data=DataSettings(mix=mix_of(files)), trainer=TrainerSettings(shuffle=False))


def test_a_mixture_that_lies_elsewhere_is_the_same(files) -> None:
    def settings(mix: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return dataclasses.asdict(RunConfig(data=DataSettings(mix=mix, **more)))

    before = settings(mix_of(files))
    moved = [{**one, "train_file": f"/elsewhere/{one['name']}"} for one in mix_of(files)]
    assert changed_settings(before, settings(moved, cache="never", cache_dir="/x", num_workers=3)) == []
    assert "data.mix" in changed_settings(before, settings(mix_of(files, (1, 4))))[0]


STREAMED: dict[str, Any] = {
    "train_file": "x.jsonl", "streaming": True, "max_source_length": 60, "max_target_length": 60,
}  # fmt: skip


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        (
            {"group_by_length": True},
            r"`trainer\.group_by_length` is true.*streaming.*trainer\.group_by_length=false",
        ),
        (
            {"max_steps": None, "num_train_epochs": 1.0},
            r"`trainer\.max_steps` is null.*streaming.*how many make an epoch",
        ),
        (
            {"dataloader_num_workers": 2},
            r"`trainer\.dataloader_num_workers` is 2.*streaming.*one process",
        ),
    ],
    ids=["grouping", "epochs", "workers"],
)
def test_training_refuses_what_needs_all_streamed_rows(trainer: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig(data=DataSettings(**STREAMED), trainer=TrainerSettings(**trainer))


def test_rows_are_grouped_by_length_unless_they_are_streamed() -> None:
    streamed = RunConfig(data=DataSettings(**STREAMED), trainer=TrainerSettings())
    assert streamed.trainer.group_by_length is False
    assert RunConfig(data=DataSettings(train_file="x.jsonl")).trainer.group_by_length is True
    given = RunConfig(data=DataSettings(train_file="x.jsonl"), trainer=TrainerSettings(group_by_length=False))
    assert given.trainer.group_by_length is False


def test_the_check_refuses_streams(files, capsys) -> None:
    words = [f"data.train_file={files['ads']}", "data.streaming=true"]
    words += ["data.max_source_length=60", "data.max_target_length=60"]
    assert main(["data", "check", "data=files", *words]) == 2
    assert "`data.streaming` is true, but a check needs all" in capsys.readouterr().err


def test_clearing_says_what_was_deleted(files, capsys, tmp_path: Path) -> None:
    kept = f"data.cache_dir={tmp_path / 'kept'}"
    assert (
        main(["data", "check", "data=files", f"data.train_file={files['ads']}", "data.cache=always", kept])
        == 0
    )
    capsys.readouterr()
    assert main(["data", "clear", kept]) == 0
    assert "deleted 2 sets of encoded rows" in capsys.readouterr().out
    assert main(["data", "clear", kept]) == 0
    assert "deleted 0 sets" in capsys.readouterr().out
    assert main(["data", "clear", "name=mmlu"]) == 2
    assert "`glmtune data clear` reads no benchmark" in capsys.readouterr().err
