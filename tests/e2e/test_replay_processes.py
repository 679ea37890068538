"""Replay in two real processes: the gradient is that of the formula, and they equal one process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glmtune.data.dataset import load_split
from glmtune.data.settings import DataSettings
from glmtune.loading import load_tokenizer
from glmtune.models.load import load_official
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.init import build_prefix_encoder
from glmtune.prefix.settings import PrefixSettings
from glmtune.retention.base_answers import BaseAnswers, read_answers
from tests.conftest import slow_except
from tests.e2e.stories import Story, run_sessions

QUESTIONS = ("你好", "How many apples are left?", "这条裙子颜色很白。", "1 + 2 =", "写一段广告。")
FULL, PREFIX, LORA = "+recipe=full", "+recipe=ptuning", "+recipe=lora"
ONE, TWO = "trainer.per_device_train_batch_size=4", "trainer.per_device_train_batch_size=2"
# 37 rows, 8 in a step: the last step of an epoch has 5. Two general rows in a step.
COMMON = [
    *("data=files", "data.layout=adgen", "data.max_train_samples=37", "resume=force", "seed=3"),
    *("trainer.learning_rate=1e-3", "trainer.max_steps=8", "trainer.gradient_accumulation_steps=2"),
    *("trainer.logging_steps=1", "trainer.save_steps=4", "trainer.report_to=[]", "trainer.max_grad_norm=0"),
    *("retention=null", "retain=normal", "retain.max_new_tokens=10"),
]
# One step of sixteen rows: four micro-batches of two processes. Five general rows: a filler in the third pass.
GOLDEN = [
    *("data.max_train_samples=16", "trainer.gradient_accumulation_steps=4", "trainer.max_steps=1"),
    *("retain.rows=5", "retain.weight=3"),
]
SMALL = ["prefix.pre_seq_len=4", "prefix.dropout=0"]
ZERO = [name for name in ("zero2", "zero3") if importlib.util.find_spec("deepspeed")]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in QUESTIONS))
    return file


@pytest.fixture(scope="module")
def base(tiny_base: Path, tiny_rows: dict[str, Path], prompts: Path) -> list[str]:
    files = [f"data.{name}_file={tiny_rows[name]}" for name in ("train", "validation")]
    return [*COMMON, f"model.source={tiny_base}", f"retain.prompts={prompts}", *files]


@pytest.fixture(scope="module")
def story(base: list[str], slow_too: bool, tmp_path_factory: pytest.TempPathFactory) -> Story:
    plan: list[dict[str, Any]] = []

    def session(name: str, recipe: str, *words: str, count: int = 2, **fate: Any) -> None:
        overrides = [recipe, *base, ONE if count == 1 else TWO, f"output_dir={fate.pop('run', name)}", *words]
        plan.append({"name": name, "overrides": overrides, "count": count, **fate})

    keeps = {"fate": "keeps_gradient", "rank": "all", "step": 1}
    session("golden-full", FULL, *GOLDEN, **keeps)
    session("golden-fsdp", FULL, *GOLDEN, "distributed=fsdp", **keeps)
    session("golden-kl", PREFIX, *GOLDEN, *SMALL, "retain.loss=kl", **keeps)
    session("one", FULL, count=1)
    for stage in ZERO if slow_too else ZERO[1:]:
        session(stage, FULL, f"deepspeed={stage}")
    kl = (LORA, "lora.dropout=0", "retain.loss=kl")
    if slow_too:
        session("fsdp", FULL, "distributed=fsdp")
        session("kl-one", *kl, count=1)
        session("kl-fsdp", *kl, "distributed=fsdp")
    if slow_too and ZERO:
        session("kl-zero3", *kl, "deepspeed=zero3")
    session("killed", FULL, fate="killed_in_step", step=6)
    session("resumed", FULL, "resume=auto", run="killed")
    session("whole", FULL)
    return run_sessions(tmp_path_factory.mktemp("replay"), plan)


def assert_ended(story: Story, *names: str) -> None:
    for name in names:
        assert set(story.codes(name)) == {0}, story.said(name, 0)[-3000:] + story.said(name, 1)[-2000:]


def general_answers(story: Story, run: str, tiny_base: Path) -> BaseAnswers:
    return read_answers(story.folder / run / "retention" / "retain.jsonl", load_tokenizer(tiny_base))


def task_rows(base: list[str]) -> list[tuple[list[int], list[int]]]:
    """Return tokens and labels of the sixteen rows of the one step."""
    values = dict(word.split("=", 1) for word in base)
    settings = DataSettings(layout="adgen", train_file=values["data.train_file"], max_train_samples=16)
    split = load_split(settings, "train", load_tokenizer(values["model.source"]))
    return [(row["input_ids"], row["labels"]) for row in split.rows]


def log_probabilities(model: Any, ids: list[int], **keywords: Any) -> Tensor:
    """Return log p of every token's followers ``[S, V]``, each row run by itself."""
    return model(input_ids=torch.tensor([ids]), **keywords).logits[0].log_softmax(-1)


def summed_loss(model: Any, ids: list[int], labels: list[int]) -> Tensor:
    scores = log_probabilities(model, ids)
    places = [place for place in range(1, len(ids)) if labels[place] != -100]
    return -torch.stack([scores[place - 1, labels[place]] for place in places]).sum()


def assert_gradient(story: Story, run: str, model: Any, loss: Tensor) -> None:
    loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    for rank in (0, 1):
        kept = torch.load(story.folder / run / f"gradient-{rank}.pt")
        assert kept.keys() == expected.keys() != set()
        for name, (_, gradient) in kept.items():
            scale = expected[name].abs().max()
            assert (gradient - expected[name]).abs().max() < 2e-5 * scale + 1e-8, name


def task_mean(model: Any, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    total = torch.stack([summed_loss(model, *row) for row in rows]).sum()
    return total / sum(label != -100 for _, labels in rows for label in labels)


@pytest.mark.parametrize("run", ["golden-full", "golden-fsdp"])
def test_the_gradient_is_that_of_the_formula(
    story: Story, base: list[str], tiny_base: Path, run: str
) -> None:
    assert_ended(story, run)
    model = load_official(tiny_base, device="cpu")
    answers = general_answers(story, run, tiny_base)
    assert len(answers) == 5
    task = task_mean(model, task_rows(base))
    pairs = list(zip(answers.prompt_ids, answers.answer_ids, strict=True))
    lost = [summed_loss(model, [*asked, *said], [-100] * len(asked) + said) for asked, said in pairs]
    general = torch.stack(lost).sum() / sum(map(len, answers.answer_ids))
    assert story.losses(run) == pytest.approx([task.item()], rel=1e-5)
    assert story.logged(run, "retain_loss") == pytest.approx([general.item()], rel=1e-5)
    assert_gradient(story, run, model, task + 3 * general)


def test_the_gradient_of_kl_is_that_of_the_formula(story: Story, base: list[str], tiny_base: Path) -> None:
    assert_ended(story, "golden-kl")
    model = load_official(tiny_base, device="cpu")
    model.requires_grad_(False)
    answers = general_answers(story, "golden-kl", tiny_base)
    bare = [
        log_probabilities(model, [*asked, *said])
        for asked, said in zip(answers.prompt_ids, answers.answer_ids, strict=True)
    ]
    attach_prefix(model, build_prefix_encoder(model, PrefixSettings(pre_seq_len=4, dropout=0.0)))
    kept = torch.load(story.folder / "golden-kl" / "gradient-0.pt")
    weights = dict(model.named_parameters())
    for name, (weight, _) in kept.items():
        weights[name].data.copy_(weight)
    task = task_mean(model, task_rows(base))
    lost = []
    for asked, said, scores in zip(answers.prompt_ids, answers.answer_ids, bare, strict=True):
        tuned = log_probabilities(model, [*asked, *said])
        places = range(len(asked) - 1, len(asked) + len(said) - 1)
        lost += [(scores[place].exp() * (scores[place] - tuned[place])).sum() for place in places]
    general = torch.stack(lost).sum() / sum(map(len, answers.answer_ids))
    assert story.logged("golden-kl", "retain_loss") == pytest.approx([general.item()], rel=1e-4)
    assert_gradient(story, "golden-kl", model, task + 3 * general)


CELLS = [
    *((stage, "one") for stage in ("zero3", "zero2") if stage in ZERO),
    *[("fsdp", "one"), ("kl-fsdp", "kl-one")],
    *[("kl-zero3", "kl-one")] * bool(ZERO),
]


@pytest.mark.parametrize(("run", "other"), slow_except(CELLS[:1], CELLS) if ZERO else CELLS)
def test_two_processes_equal_one(story: Story, run: str, other: str) -> None:
    assert_ended(story, run)
    assert_ended_alone(story, other)
    for key in ("loss", "tokens"):
        assert story.logged(run, key) == pytest.approx(story.logged(other, key), rel=2e-5), key
    assert story.logged(run, "retain_loss") == pytest.approx(
        story.logged(other, "retain_loss"), rel=2e-4, abs=1e-6
    )
    if other == "kl-one":  # adapters begin as the base itself
        first, *rest = story.logged(other, "retain_loss")
        assert abs(first) < 1e-6 < min(rest)
    mine, theirs = story.weights(run), story.weights(other)
    assert mine.keys() == theirs.keys() != set()
    for name, weight in mine.items():
        assert (weight - theirs[name]).abs().max() < 3e-4, name


def assert_ended_alone(story: Story, name: str) -> None:
    assert story.codes(name) == [0], story.said(name, 0)[-3000:]


def test_a_killed_run_goes_on_with_the_same_numbers(story: Story) -> None:
    assert any(story.codes("killed"))
    assert_ended(story, "resumed", "whole")
    for key in ("loss", "retain_loss", "tokens"):
        assert story.logged("killed", key) == story.logged("whole", key), key
    expected, found = story.weights("whole"), story.weights("killed")
    assert all(bool((expected[key] == found[key]).all()) for key in expected)


def test_all_processes_answer_as_one_does(story: Story, tiny_base: Path) -> None:
    runs = ["one", "golden-full", "golden-fsdp", *ZERO[1:]]
    texts = [general_answers(story, run, tiny_base).answer_ids for run in runs]
    assert all(found == texts[0] for found in texts)
