"""Two real processes under FSDP2: they equal one process, and either goes on where the other stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from glmtune.cli import main
from glmtune.data.dataset import load_split
from glmtune.loading import load_tokenizer
from glmtune.models.tokenizers.base import GlmTokenizer
from recipes.train import COMMAND
from recipes.words.compose import load_settings
from tests.e2e.stories import Story
from tests.e2e.stories import run_sessions as run_plan

ONE = "trainer.per_device_train_batch_size=4"  # the rows that two processes take together
TWO = "trainer.per_device_train_batch_size=2"
FSDP = "distributed=fsdp"
FULL, PREFIX, LORA = "+recipe=full", "+recipe=ptuning", "+recipe=lora"
# 37 rows, 8 in a step: the last step of an epoch has 5, its last forward pass a single one for two processes.
COMMON = [
    *("data=files", "data.layout=adgen", "data.max_train_samples=37", "resume=force", "seed=3"),
    *(
        "retention=null",
        "trainer.learning_rate=1e-3",
        "trainer.max_steps=8",
        "trainer.gradient_accumulation_steps=2",
    ),
    *("trainer.logging_steps=1", "trainer.save_steps=4", "trainer.report_to=[]"),
]
CALM = ["lora.dropout=0", "prefix.dropout=0"]  # every process draws its own random numbers


def assert_equal(story: Story, run: str, other: str) -> None:
    for name in (run, other):
        assert set(story.codes(name)) == {0}, story.said(name, 0)[-3000:]
    assert len(story.losses(run)) == 8
    assert story.losses(run) == pytest.approx(story.losses(other), rel=2e-5)
    mine, theirs = story.weights(run), story.weights(other)
    assert mine.keys() == theirs.keys() != set()
    for name, weight in mine.items():
        assert (weight - theirs[name]).abs().max() < 2e-4, name


def run_sessions(
    folder: Path, base: list[str], plan: list[tuple[str, int, list[str], dict[str, Any]]]
) -> Story:
    """Run sessions, each given as name, number of processes, overrides, and what befalls it."""
    sessions = [
        {
            "name": name,
            "count": count,
            "overrides": [
                *overrides[:1],
                *base,
                ONE if count == 1 else TWO,
                f"output_dir={fate.pop('run', name)}",
                *overrides[1:],
            ],
            **fate,
        }
        for name, count, overrides, fate in plan
    ]
    return run_plan(folder, sessions)


@pytest.fixture(scope="module")
def base(tiny_base: Path, tiny_rows: dict[str, Path]) -> list[str]:
    files = [f"data.{name}_file={tiny_rows[name]}" for name in ("train", "validation")]
    return [*COMMON, f"model.source={tiny_base}", *files]


@pytest.fixture(scope="module")
def story(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Story:
    plan = [
        ("one", 1, [FULL], {}),
        ("two", 2, [FULL, FSDP], {}),
        ("from-two", 1, [FULL, "resume=two/checkpoint-4"], {}),
        ("two-again", 2, [FULL, FSDP, "resume=two/checkpoint-4"], {}),
        ("from-one", 2, [FULL, FSDP, "resume=one/checkpoint-4"], {}),
        ("alone", 1, [FULL, FSDP], {}),
        ("spoilt", 2, [FULL], {"fate": "not_finite", "step": 6}),
    ]
    return run_sessions(tmp_path_factory.mktemp("fsdp"), base, plan)


def test_two_processes_equal_one(story: Story) -> None:
    assert_equal(story, "two", "one")


def test_the_log_counts_every_token_once_and_no_filler(story: Story, base: list[str]) -> None:
    settings = load_settings(COMMAND, [FULL, *base])
    tokenizer = cast(GlmTokenizer, load_tokenizer(settings.model.source))
    rows = load_split(settings.data, "train", tokenizer)
    assert len(rows.lengths) == 37
    tokens = story.logged("two", "tokens")
    # Step 5 ends the epoch, and in its last forward pass one of the two processes has no row.
    assert tokens[4] == rows.num_tokens
    assert tokens == story.logged("one", "tokens")


def test_one_process_goes_on_from_two(story: Story) -> None:
    assert story.codes("from-two") == [0], story.said("from-two", 0)[-3000:]
    assert story.losses("from-two") == pytest.approx(story.losses("one")[4:], rel=2e-5)


def test_two_processes_go_on_from_two(story: Story) -> None:
    assert story.codes("two-again") == [0, 0], story.said("two-again", 0)[-3000:]
    assert story.losses("two-again") == story.losses("two")[4:]
    expected, found = story.weights("two"), story.weights("two-again")
    assert all(bool((expected[key] == found[key]).all()) for key in expected)


def test_what_two_processes_made_is_exported_and_answers(
    story: Story, tiny_rows: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, said = story.folder / "out", story.folder / "said"
    source = f"model.source={story.folder / 'two' / 'last'}"
    assert main(["export", source, "format=official", f"output_dir={out}"]) == 0
    assert "reloaded and compared" in capsys.readouterr().out
    words = [
        f"model.source={out}",
        "data=files",
        "data.layout=adgen",
        f"data.test_file={tiny_rows['validation']}",
    ]
    words += ["data.max_predict_samples=2", f"output_dir={said}", "generation.max_new_tokens=4"]
    assert main(["predict", *words]) == 0
    lines = (said / "generated_predictions.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert all("prediction" in json.loads(line) for line in lines)


def test_two_processes_go_on_from_one(story: Story) -> None:
    assert story.codes("from-one") == [0, 0], story.said("from-one", 0)[-3000:]
    assert story.losses("from-one") == pytest.approx(story.losses("one")[4:], rel=2e-5)


def test_one_process_has_nothing_to_divide(story: Story) -> None:
    assert story.codes("alone") == [2]
    assert "this run has one process" in story.said("alone", 0)
    assert "launch.num_processes" in story.said("alone", 0)


def test_a_loss_not_finite_in_one_process_sends_all_back(story: Story) -> None:
    assert story.codes("spoilt") == [0, 0], story.said("spoilt", 0)[-3000:] + story.said("spoilt", 1)[-3000:]
    alert = next(entry for entry in story.log("spoilt") if entry.get("alert") == "rollback")
    assert (alert["step"], alert["failed_step"]) == (4, 6)
    rates = [entry["learning_rate"] for entry in story.log("spoilt") if "loss" in entry]
    plain = [entry["learning_rate"] for entry in story.log("one") if "loss" in entry]
    assert rates == pytest.approx([*plain[:4], *(rate / 2 for rate in plain[4:])])


@pytest.mark.slow
def test_prefix_and_adapters(base: list[str], tmp_path: Path) -> None:
    plan = [
        ("prefix-one", 1, [PREFIX, CALM[1]], {}),
        ("prefix-two", 2, [PREFIX, CALM[1], FSDP], {}),
        ("lora-one", 1, [LORA, CALM[0]], {}),
        ("lora-two", 2, [LORA, CALM[0], FSDP], {}),
    ]
    story = run_sessions(tmp_path, base, plan)
    assert_equal(story, "prefix-two", "prefix-one")
    assert_equal(story, "lora-two", "lora-one")


@pytest.mark.slow
def test_divided_and_not_finite_the_same_command_goes_back(base: list[str], tmp_path: Path) -> None:
    spoilt = {"fate": "not_finite", "step": 6}
    plan = [("first", 2, [FULL, FSDP], {"run": "run", **spoilt}), ("second", 2, [FULL, FSDP], {"run": "run"})]
    story = run_sessions(tmp_path, base, plan)
    assert 0 not in story.codes("first")
    assert "The same command starts anew, going back from step 6 to checkpoint-4" in story.said("first", 0)
    assert story.codes("second") == [0, 0]
    assert any(entry.get("alert") == "rollback" for entry in story.log("run"))
