"""`glmtune dial`: loss and retention at several strengths, kept as they come, from the run's own data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from glmtune.cli import main
from glmtune.dial.measure import Dial
from glmtune.dial.points import DialPoint, parse_point
from glmtune.dial.report import best_point
from glmtune.errors import ConfigError
from glmtune.loading import load_model, load_tokenizer
from glmtune.retention.settings import RetentionSettings
from recipes.dial import DialConfig, run

ROWS = (("红裙子", "颜色很红。"), ("白衬衫", "面料柔软，穿着舒服。"), ("hat", "A warm hat."))
FEW = RetentionSettings(num_prompts=5, max_new_tokens=6)
WORDS = ["retention.num_prompts=5", "retention.max_new_tokens=6"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of a random prefix and a random LoRA on glm-tiny, with the settings of their runs."""
    from glmtune.models.load import load_official
    from glmtune.prefix.checkpoint import PrefixMeta, save_prefix
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
    from glmtune.switch.rule import Switch, SwitchFacts
    from glmtune.training.adapt import tune_adapter
    from glmtune.training.checkpoints.folder import writing
    from glmtune.training.settings import LoraSettings

    folder = tmp_path_factory.mktemp("dial")
    rows = [json.dumps({"prompt": question, "response": answer}) for question, answer in ROWS]
    (folder / "dev.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = {
        "train_file": "gone.jsonl", "validation_file": str(folder / "dev.jsonl"), "prompt_column": "prompt",
        "response_column": "response", "max_source_length": 32, "max_target_length": 16,
    }  # fmt: skip
    torch.manual_seed(1)
    model = load_official("glm-tiny")
    facts = {"base_fingerprint": model.fingerprint()}
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4)
    # It leaves every request to the base: a dial measures the prefix all the same.
    facts_of_switch = SwitchFacts("one_class", None, 0.0, None, 1, 0)
    encoder.switch = Switch(torch.zeros(model.config.hidden_size), -1.0, facts_of_switch)
    save_prefix(encoder, folder / "prefix" / "last", meta=PrefixMeta(**facts))
    tuned = tune_adapter(model, LoraSettings(rank=2))
    for name, weight in tuned.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    with writing(folder / "lora" / "last", manifest=facts) as last:
        tuned.save(last)
    for name in ("prefix", "lora"):
        settings = {"tune": name, "data": data}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return {"prefix_path": folder / "prefix", "adapter_path": folder / "lora"}


def config_of(runs: dict[str, Path], name: str, folder: Path, **changes: Any) -> DialConfig:
    settings: dict[str, Any] = {"strengths": [0.0, 0.5, 1.0], "retention": FEW, "output_dir": str(folder)}
    settings |= {name: str(runs[name]), **changes}
    return DialConfig(**settings)


def loss_by_hand(runs: dict[str, Path], **tuned: Any) -> float:
    """Mean over all answer tokens, row by row and without batches."""
    from glmtune.data.dataset import load_split
    from glmtune.data.settings import DataSettings

    data = yaml.safe_load((runs["prefix_path"] / "config.yaml").read_text("utf-8"))["data"]
    rows: Any = load_split(DataSettings(**data), "validation", load_tokenizer("glm-tiny")).rows  # pyright: ignore[reportArgumentType]
    model = load_model("glm-tiny", device="cpu", **tuned)
    losses: list[torch.Tensor] = []
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[labels != -100], labels[labels != -100], reduction="none"
            )
        )
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize(("name", "option"), [("prefix_path", "prefix"), ("adapter_path", "adapter")])
def test_every_strength_is_what_it_is_measured_as(
    name: str, option: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(config_of(runs, name, tmp_path / "out"))
    assert [point.strength for point in result.points] == [0.0, 0.5, 1.0]
    setting = {"prefix": "prefix_strength", "adapter": "adapter_scale"}[option]
    for point in result.points:
        expected = loss_by_hand(runs, **{option: runs[name], setting: point.strength})
        assert point.loss_nats == pytest.approx(expected, abs=1e-4)
    base, _, whole = result.points
    assert base.loss_nats == pytest.approx(loss_by_hand(runs), abs=1e-5)
    assert (base.kept_frac, base.leak_frac) == (1.0, 0.0)
    assert base.kl_nats == pytest.approx(0, abs=1e-6)
    assert whole.kl_nats > 0.01
    assert whole.kept_frac < 1
    assert whole.rouge_l is None
    out = capsys.readouterr().out
    assert f"as in the training of {runs[name] / 'last'}" in out.replace("/prefix_encoder.safetensors", "")
    assert "100.0 %" in out
    written = json.loads((tmp_path / "out" / "dial.json").read_text())
    assert [DialPoint(**point) for point in written["points"]] == list(result.points)
    assert (tmp_path / "out" / "dial.png").read_bytes().startswith(b"\x89PNG")


def test_strength_1_is_what_a_command_measures_without_one(runs: dict[str, Path], tmp_path: Path) -> None:
    """Answers at a strength are those of `glmtune predict` at the same strength."""
    found = run(config_of(runs, "prefix_path", tmp_path / "out", strengths=[0.5], rouge=True)).points[0]
    words = [f"prefix_path={runs['prefix_path']}", "prefix_strength=0.5", "use_switch=false", "data=files"]
    words += [f"data.test_file={runs['prefix_path'].parent / 'dev.jsonl'}", "data.max_source_length=32"]
    assert main(["predict", *words, "data.max_target_length=16", f"output_dir={tmp_path / 'predict'}"]) == 0
    scores = json.loads((tmp_path / "predict" / "predict_results.json").read_text())
    assert found.rouge_l == pytest.approx(scores["metrics"]["rouge-l"]["value"], abs=1e-9)


def test_a_dial_that_was_killed_goes_on(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(runs, "prefix_path", tmp_path / "out")
    whole = run(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    real, measured = Dial.measure, []

    def spy(self: Dial, strength: float, *rest: Any) -> DialPoint:
        measured.append(strength)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(self, strength, *rest)

    monkeypatch.setattr(Dial, "measure", spy)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    journal = tmp_path / "out" / "dial.jsonl"
    assert parse_point(journal.read_text()).strength == 0.0
    answers = (tmp_path / "out" / "base.jsonl").stat().st_mtime_ns
    resumed = run(config)
    assert measured == [0.0, 0.5, 0.5, 1.0]
    assert (tmp_path / "out" / "base.jsonl").stat().st_mtime_ns == answers, "the base is asked once"
    alike = [[dataclasses.replace(each, seconds=0) for each in result.points] for result in (whole, resumed)]
    assert alike[0] == alike[1]
    assert [point.strength for point in run(config).points] == [0.0, 0.5, 1.0]
    assert len(measured) == 4, "nothing is left to measure"
    with pytest.raises(ConfigError, match=r"3 strengths of another run \(num_rows|max_new_tokens"):
        run(dataclasses.replace(config, retention=dataclasses.replace(FEW, max_new_tokens=5)))
    anew = dataclasses.replace(config, strengths=[1.0], resume="never")
    assert run(anew).points[0].strength == 1.0
    assert measured == [0.0, 0.5, 0.5, 1.0, 1.0]


def test_the_command(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "other.jsonl"
    rows.write_text(json.dumps({"prompt": "hat", "response": "A warm hat."}), encoding="utf-8")
    words = [f"adapter_path={runs['adapter_path']}", "strengths=[1,0]", "retention.target=1", *WORDS]
    words += [f"data.validation_file={rows}", f"output_dir={tmp_path / 'out'}"]
    assert main(["dial", *words]) == 0
    out = capsys.readouterr().out
    assert "1 rows" in out
    written = json.loads((tmp_path / "out" / "dial.json").read_text())
    assert (written["num_rows"], written["strength"]) == (1, "adapter_scale")
    assert [point["strength"] for point in written["points"]] == [0, 1]
    assert "among those that keep at least 100 %: adapter_scale 0" in out
    assert out.splitlines()[-1].startswith(
        f"next: glmtune chat adapter_path={runs['adapter_path']} adapter_scale=0"
    )


def test_rows_that_nobody_names(runs: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    alone = shutil.copytree(runs["prefix_path"] / "last", tmp_path / "alone")
    config = DialConfig(prefix_path=str(alone), retention=FEW)
    with pytest.raises(ConfigError, match=r"`data` is not set, and no run beside .*tells which rows"):
        run(config)
    (alone / "config.yaml").write_text("tune: prefix\ndata: {validation_file: '${oc.env:ROWS}'}\n")
    with pytest.raises(ConfigError, match=r"`data.validation_file` of .* came from the environment"):
        run(config)
    (alone / "config.yaml").write_text("tune: prefix\ndata: {train_file: a.jsonl}\n")
    with pytest.raises(ConfigError, match=r"`data` has no rows for evaluation"):
        run(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"`prefix_path` and `adapter_path` are not set, .* `glmtune dial prefix_path=RUN`"),
        ({"prefix_path": "a", "adapter_path": "b"}, r"are both set"),
        ({"prefix_path": "a", "strengths": []}, r"`strengths` is empty"),
        ({"prefix_path": "a", "strengths": [0.5, -1.0]}, r"`strengths` is -1.0, but .* from 0"),
        ({"prefix_path": "a", "strengths": [0.5, 0.5]}, r"each may stand there once"),
        ({"prefix_path": "a", "batch_size": 0}, r"`batch_size` is 0"),
        ({"prefix_path": "a", "resume": "yes"}, r"`resume` is `yes`"),
        ({"prefix_path": "a", "retention": RetentionSettings(exam="exam")}, r"`glmtune dial` asks no exam"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(DialConfig(**values))


def test_the_best_point_keeps_enough() -> None:
    points = [
        DialPoint(strength, loss, kept, 0.0, 0.0, None, 1.0)
        for strength, loss, kept in ((0.0, 5.0, 1.0), (0.5, 2.0, 0.9), (1.0, 1.0, 0.1))
    ]
    assert best_point(points, None) == points[2]
    assert best_point(points, 0.9) == points[1]
    assert best_point(points[1:], 0.95) is None


@pytest.mark.parametrize("line", ["{}", "[1]", '{"strength": 1}', "no"])
def test_lines_that_are_no_points(line: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_point(line)
