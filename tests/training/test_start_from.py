"""A new run begins with what was tuned before: `prefix_path`, `adapter_path`, `init_from`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_base
from glmtune.prefix.checkpoint import export_official_prefix, load_prefix
from glmtune.training.log import read_log
from recipes.plan import COMMAND as PLAN
from recipes.train import COMMAND, TrainResult, run
from recipes.words.compose import load_settings

RECIPES = {
    "prefix": [
        "+recipe=ptuning",
        "prefix.pre_seq_len=4",
        "prefix.prefix_projection=true",
        "prefix.dropout=0",
    ],
    "lora": ["+recipe=lora", "lora.rank=2", "lora.dropout=0"],
    "full": ["+recipe=full"],
}
SETTING = {"prefix": "prefix_path", "lora": "adapter_path", "full": "init_from"}
FILE = {
    "prefix": "prefix_encoder.safetensors",
    "lora": "adapter_model.safetensors",
    "full": "model.safetensors",
}
Train = Callable[..., TrainResult]


@pytest.fixture(scope="module")
def old(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One finished run of each kind, visibly away from where it began; do not change them."""
    runs = {}
    for kind, recipe in RECIPES.items():
        runs[kind] = tmp_path_factory.mktemp("old") / kind
        words = [
            "retention=null",
            "trainer.max_steps=3",
            "trainer.learning_rate=5e-2",
            "trainer.lr_scheduler_type=constant",
        ]
        train(tiny_base, tiny_rows, runs[kind], *recipe, *words)
    return runs


def train(base: Path, rows: dict[str, Path], output: Path, *words: str) -> TrainResult:
    common = [
        *("data=files", "data.layout=adgen", f"model.source={base}", f"output_dir={output}"),
        *(f"data.train_file={rows['train']}", f"data.validation_file={rows['validation']}"),
        *("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1"),
        *(
            "trainer.logging_steps=1",
            "trainer.save_steps=1",
            "trainer.report_to=[]",
            "launch.num_processes=1",
        ),
    ]
    return run(load_settings(COMMAND, [*words[:1], *common, *words[1:]]))


@pytest.fixture
def begin(tiny_base: Path, tiny_rows: dict[str, Path], tmp_path: Path) -> Train:
    """Train in ``tmp_path/new`` for a step, whose one batch is all rows of the old run's evaluation."""

    def begin(kind: str, *words: str) -> TrainResult:
        same = [f"data.train_file={tiny_rows['validation']}", "trainer.max_steps=1", "retention=null"]
        return train(tiny_base, tiny_rows, tmp_path / "new", *RECIPES[kind], *same, *words)

    return begin


def first_loss(result: TrainResult) -> float:
    return next(entry["loss"] for entry in read_log(result.output_dir) if "loss" in entry)


def last_evaluation(run_folder: Path) -> float:
    return json.loads((run_folder / "all_results.json").read_text())["final_eval_loss"]


@pytest.mark.parametrize(
    ("kind", "place"),
    [("prefix", ""), ("lora", ""), ("full", ""), ("full", "last"), ("prefix", "checkpoint-3")],
)
def test_the_first_loss_is_the_last_one(kind: str, place: str, old: dict[str, Path], begin: Train) -> None:
    result = begin(kind, f"{SETTING[kind]}={old[kind] / place}")
    reached = last_evaluation(old[kind])
    began = json.loads((old[kind] / "all_results.json").read_text())["baseline_eval_loss"]
    assert abs(reached - began) > 0.01, "the old run went somewhere"
    assert first_loss(result) == pytest.approx(reached, rel=1e-5)
    assert result.steps == 1


@pytest.mark.parametrize("kind", RECIPES)
def test_it_is_recorded_and_not_needed_again(
    kind: str, old: dict[str, Path], begin: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "old"
    shutil.copytree(old[kind], moved)
    words = [
        f"{SETTING[kind]}={moved}",
        "retention=null",
        "trainer.max_steps=2",
        "trainer.lr_scheduler_type=constant",
    ]
    whole = begin(kind, *words)
    assert "beginning with" in capsys.readouterr().err
    folder = whole.output_dir
    assert yaml.safe_load((folder / "config.yaml").read_text())[SETTING[kind]] == str(moved)
    manifests = [
        json.loads((folder / name / "checkpoint.json").read_text()) for name in ("last", "checkpoint-1")
    ]
    for holder in (*manifests, whole.results):
        started = holder["started_from"]
        assert Path(started["path"]).is_relative_to(moved)
        assert len(started["fingerprint"]) == 64
    assert (
        f"| began with | {started['path']} (`{started['fingerprint'][:16]}`) |"
        in (folder / "README.md").read_text()
    )
    weights = load_file(folder / "last" / FILE[kind])
    # Damaged, then gone: the run goes on from its own first checkpoint to the very same weights.
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "all_results.json").unlink()
    shutil.rmtree(moved)
    again = begin(kind, *words)
    assert again.results["started_from"] == started
    for name, value in load_file(folder / "last" / FILE[kind]).items():
        assert torch.equal(value, weights[name]), name


def test_a_prefix_of_another_length(
    old: dict[str, Path], begin: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    begin("prefix", f"prefix_path={old['prefix']}", "prefix.pre_seq_len=6")
    assert "its 4 positions and 2 fresh ones" in capsys.readouterr().err
    begin("prefix", f"prefix_path={old['prefix']}", "prefix.pre_seq_len=3", "resume=never")
    assert "the first 3 of its 4 positions; the others are left out" in capsys.readouterr().err


def test_a_projected_prefix_made_plain(old: dict[str, Path], begin: Train) -> None:
    result = begin("prefix", f"prefix_path={old['prefix']}", "prefix.prefix_projection=false")
    assert first_loss(result) == pytest.approx(last_evaluation(old["prefix"]), rel=1e-5)


def test_an_official_prefix(old: dict[str, Path], begin: Train, tiny_base: Path, tmp_path: Path) -> None:
    encoder = load_prefix(old["prefix"], load_base(tiny_base, device="cpu"))
    file = export_official_prefix(encoder, tmp_path / "official")
    for place in (file, file.parent):
        result = begin("prefix", f"prefix_path={place}", "resume=never")
        assert first_loss(result) == pytest.approx(last_evaluation(old["prefix"]), rel=1e-5)


def test_an_adapter_under_another_scale_adds_the_same(old: dict[str, Path], begin: Train) -> None:
    result = begin("lora", f"adapter_path={old['lora']}", "lora.alpha=12")
    assert first_loss(result) == pytest.approx(last_evaluation(old["lora"]), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("prefix", ["adapter_path={lora}"], r"`adapter_path` is .* but `tune` is `prefix`.*\+recipe=lora"),
        ("lora", ["prefix_path={prefix}"], r"`prefix_path` is .* but `tune` is `lora`.*\+recipe=ptuning"),
        ("lora", ["init_from={full}"], r"`init_from` is .* but `tune` is `lora`.*`model.source`"),
        ("full", ["prefix_path={prefix}"], r"`prefix_path` is .* but `tune` is `full`.*`init_from=`"),
        ("full", ["init_from={full}", "from_scratch=true"], r"`from_scratch` is true and `init_from`"),
        (
            "prefix",
            ["prefix_path={lora}"],
            r"what was tuned there is an adapter.*\+recipe=lora adapter_path=",
        ),
        (
            "prefix",
            ["prefix_path={full}"],
            r"what was tuned there is a whole model.*\+recipe=full init_from=",
        ),
        (
            "lora",
            ["adapter_path={prefix}"],
            r"what was tuned there is a prefix.*\+recipe=ptuning prefix_path=",
        ),
        ("full", ["init_from={lora}"], r"what was tuned there is an adapter.*\+recipe=lora adapter_path="),
        (
            "lora",
            ["adapter_path={lora}", "lora.rank=4"],
            r"`lora.rank` is 4.*rank 2.*lora.rank=2.*glmtune export",
        ),
        (
            "lora",
            ["adapter_path={lora}", "lora.targets=[o_proj]"],
            r"`lora.targets` are o_proj.*k_proj,q_proj,v_proj",
        ),
    ],
)
def test_refused_by_name(kind: str, words: list[str], said: str, old: dict[str, Path], begin: Train) -> None:
    places = {name: str(folder) for name, folder in old.items()}
    with pytest.raises(ConfigError, match=said):
        begin(kind, *(word.format(**places) for word in words))


@pytest.mark.parametrize("kind", RECIPES)
def test_nothing_there(kind: str, begin: Train, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the path does not exist"):
        begin(kind, f"{SETTING[kind]}={tmp_path / 'nowhere'}")


@pytest.mark.parametrize("kind", RECIPES)
def test_another_base_is_refused(
    kind: str, old: dict[str, Path], begin: Train, tiny_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 0.1 for name, value in weights.items()}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"was trained on another base"):
        begin(kind, f"{SETTING[kind]}={old[kind]}", f"model.source={other}")


def test_an_export_and_codes(old: dict[str, Path], begin: Train, tiny_base: Path, tmp_path: Path) -> None:
    """An export tells no base: its shapes must do."""
    export = tmp_path / "export"
    shutil.copytree(old["full"] / "last", export)
    (export / "checkpoint.json").unlink()
    result = begin("full", f"init_from={export}")
    assert first_loss(result) == pytest.approx(last_evaluation(old["full"]), rel=1e-5)
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "quantization_bit": 4}))
    with pytest.raises(ConfigError, match=r"`init_from` is .*codes cannot be trained"):
        begin("full", f"init_from={export}", "resume=never")


def test_plan_takes_the_same_words(old: dict[str, Path]) -> None:
    for kind, recipe in RECIPES.items():
        words = [*recipe, f"{SETTING[kind]}={old[kind]}"]
        assert getattr(load_settings(PLAN, words), SETTING[kind]) == str(old[kind])
        with pytest.raises(ConfigError, match="`tune` is"):
            load_settings(PLAN, ["+recipe=full" if kind != "full" else "+recipe=lora", *words[len(recipe) :]])
