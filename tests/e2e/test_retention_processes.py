"""Retention and switch of several processes: plain ones share the prompts, sharded ones ask together; one result."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import slow_except
from tests.e2e.stories import Story, run_sessions

EXAM = ["retention.exam=ceval", "retention.exam_limit=1"]
WAYS = {
    "one": ("prefix", 1, EXAM),
    "ddp": ("prefix", 2, EXAM),
    "fsdp": ("prefix", 2, ["distributed=fsdp", *EXAM]),
    "lora": ("lora", 1, []),
    "lora-ddp": ("lora", 2, []),
    "lora-fsdp": ("lora", 2, ["distributed=fsdp"]),
    "gate": ("gate", 1, []),
    "gate-ddp": ("gate", 2, []),
    "gate-fsdp": ("gate", 2, ["distributed=fsdp"]),
    "full": ("full", 1, []),
    "full-fsdp": ("full", 2, ["distributed=fsdp"]),
}
if importlib.util.find_spec("deepspeed"):
    WAYS |= {
        "zero2": ("prefix", 2, ["deepspeed=zero2"]),
        "zero3": ("prefix", 2, ["deepspeed=zero3"]),
        "lora-zero3": ("lora", 2, ["deepspeed=zero3"]),
        "gate-zero3": ("gate", 2, ["deepspeed=zero3"]),
        "full-zero3": ("full", 2, ["deepspeed=zero3"]),
    }
FAST = ("one", "ddp", "fsdp")
PREFIX = ["+recipe=ptuning", "prefix.pre_seq_len=4", "prefix.dropout=0"]
RECIPES = {
    "prefix": [*PREFIX, "prefix.switch=true"],
    "lora": ["+recipe=lora", "lora.rank=2", "lora.dropout=0", "lora.switch=true"],
    "gate": [*PREFIX, "prefix.gate=true", "prefix.switch=false"],
    "full": ["+recipe=full"],
}
REFERENCES = {"prefix": "one", "lora": "lora", "gate": "gate", "full": "full"}
TEXTS = (
    "你好",
    "Which fruit?",
    "3 + 4 = ?",
    "类型#裙*颜色#白*面料#棉",
    "How many?",
    "类型#裙*颜色#绿*面料#毛",
)
FIGURES = ("eval_retention", "eval_retention_kl", "eval_leak_rate", "eval_retention_switched_off")


@pytest.fixture(scope="module")
def story(
    tiny_base: Path, tiny_rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, slow_too: bool
) -> Story:
    folder = tmp_path_factory.mktemp("retention")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS))
    general = folder / "general.jsonl"
    general.write_text("\n".join(json.dumps({"prompt": f"{n} + {n + 3} = ?"}) for n in range(40)))
    plan = [
        {
            "name": name,
            "count": count,
            "overrides": [
                *RECIPES[kind],
                *([f"{kind}.switch_prompts={general}"] if kind in ("prefix", "lora") else []),
                *("data=files", "data.layout=adgen", f"model.source={tiny_base}", f"output_dir={name}"),
                *(f"data.{part}_file={tiny_rows[part]}" for part in ("train", "validation")),
                *("trainer.learning_rate=1e-3", "trainer.max_steps=3", "trainer.eval_steps=2"),
                *("trainer.gradient_accumulation_steps=1", "trainer.save_steps=3", "trainer.report_to=[]"),
                f"trainer.per_device_train_batch_size={4 // count}",
                *("trainer.logging_steps=1", f"retention.prompts={prompts}", "retention.max_new_tokens=6"),
                *more,
            ],
        }
        for name, (kind, count, more) in WAYS.items()
        if slow_too or name in FAST
    ]
    return run_sessions(folder, plan)


def results(story: Story, run: str) -> dict[str, Any]:
    return json.loads((story.folder / run / "all_results.json").read_text())


@pytest.mark.parametrize("way", slow_except(FAST, WAYS))
def test_all_ways_measure_the_same(way: str, story: Story) -> None:
    kind = WAYS[way][0]
    reference = REFERENCES[kind]
    assert set(story.codes(way)) == {0}, story.said(way, 0)[-3000:]
    assert story.losses(way) == pytest.approx(story.losses(reference), rel=2e-5)
    mine, theirs = (
        [
            [entry[name] for name in FIGURES if name in entry]
            for entry in story.log(name_of)
            if "eval_retention" in entry
        ]
        for name_of in (way, reference)
    )
    assert len(mine) == 2
    for found, expected in zip(mine, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    bases = [(story.folder / name / "retention" / "base.jsonl").read_bytes() for name in (way, reference)]
    assert bases[0] == bases[1]


@pytest.mark.parametrize(
    "way", slow_except(FAST, [way for way in WAYS if WAYS[way][0] in ("prefix", "lora")])
)
def test_all_ways_have_the_same_switch(way: str, story: Story) -> None:
    """Sharded bases are read by all processes together, others by the first; each row is decided alike."""
    reference = REFERENCES[WAYS[way][0]]
    mine, theirs = results(story, way), results(story, reference)
    assert mine["switch"] == pytest.approx(theirs["switch"])
    assert mine["switch"]["saved"]
    assert mine["switched_eval_loss"] == pytest.approx(theirs["switched_eval_loss"], rel=2e-5)
    assert mine["final_eval_retention_switched_off"] == theirs["final_eval_retention_switched_off"]
    assert 0 < mine["final_eval_retention_switched_off"] < 1
    last = story.folder / way / "last"
    files = [path for path in last.glob("*.safetensors") if path.name != "adapter_model.safetensors"]
    rules = [load_file(files[0]), story.weights(reference)]
    for name in ("switch.weight", "switch.bias"):
        scale = rules[1][name].abs().max()
        assert (rules[0][name] - rules[1][name]).abs().max() < 1e-3 * scale, name


def test_processes_share_an_exam(story: Story) -> None:
    alone, shared = (results(story, run)["retention_exam"] for run in ("one", "ddp"))
    assert shared == alone
    assert alone["num_questions"] > 0
    assert "retention_exam" not in results(story, "fsdp")


def test_sharded_weights_sit_no_exam(story: Story) -> None:
    said = story.said("fsdp", 0)
    assert "`retention.exam` is not asked: each process holds a part of the weights only" in said
    assert "glmtune eval benchmark=ceval benchmark.limit=1" in said
    assert "prefix_path=fsdp/last" in said
