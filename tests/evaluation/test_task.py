"""Tasks: names, defaults, selections, and the hashes that tell two tasks apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks.tasks import BENCHMARKS, PUBLISHED, make_task
from evaluation.sample import Prompt
from evaluation.task import hash_prompt
from glmtune.errors import GlmtuneError
from glmtune.messages import Message

SHIPPED = ("ceval", "mmlu", "gsm8k", "gsm8k_zh", "bbh")
ALSO_SHIPPED = ("ceval_hard", "cmmlu", "mmlu_pro", "gsm_symbolic", "longbench")
"""Those that need no extra."""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"benchmark": "cevl"}, r"`benchmark` is `cevl`.*Did you mean `ceval`\? Valid: ceval, "),
        ({"benchmark": "ceval", "protocol": "few_shot"}, r"`protocol` of ceval is `few_shot`.*few_shot_cot"),
        ({"benchmark": "ceval", "split": "vall"}, r"`benchmark.split` is `vall`.*Did you mean `val`"),
        ({"benchmark": "ceval", "subjects": ["logik"]}, r"`benchmark.subjects` is `logik`"),
        ({"benchmark": "ceval", "subjects": []}, r"`benchmark.subjects` is empty"),
        ({"benchmark": "ceval", "limit": 0}, r"`benchmark.limit` is 0, but it must be at least 1"),
        (
            {"benchmark": "bbh", "num_fewshot": 4},
            r"`benchmark.num_fewshot` is 4, but `protocol=few_shot_cot` has 3",
        ),
        (
            {"benchmark": "ceval", "num_fewshot": 1},
            r"`protocol=zero_shot_cot` has 0 exemplars here\. Use 0 to 0",
        ),
        ({"benchmark": "ceval", "split": "test"}, r"this sample set has no split `test`; it has: dev, val"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(GlmtuneError, match=words):
        make_task(data_dir="sample", **settings)


def test_one_published_table_has_four_benchmarks() -> None:
    assert PUBLISHED == ("mmlu", "ceval", "gsm8k", "bbh")
    assert set(PUBLISHED) <= set(BENCHMARKS)


def test_defaults_are_those_of_the_published_tables() -> None:
    found = {
        name: (
            make_task(name, data_dir="sample").protocol,
            make_task(name, data_dir="sample", is_chat=False).protocol,
        )
        for name in PUBLISHED
    }
    assert found == {
        "mmlu": ("zero_shot_cot", "few_shot_direct"),
        "ceval": ("zero_shot_cot", "few_shot_direct"),
        "gsm8k": ("few_shot_cot", "few_shot_cot"),
        "bbh": ("few_shot_cot", "few_shot_cot"),
    }
    splits = {name: make_task(name, data_dir="sample").split for name in PUBLISHED}
    assert splits == {"mmlu": "test", "ceval": "val", "gsm8k": "test", "bbh": "test"}


@pytest.mark.parametrize("name", [*SHIPPED, *ALSO_SHIPPED])
def test_shipped_sets_work_under_every_protocol(name: str) -> None:
    for protocol in BENCHMARKS[name].protocols:
        for is_chat in (True, False):
            task = make_task(name, protocol=protocol, data_dir="sample", is_chat=is_chat)
            assert task.is_sample_set
            assert task.labelled
            assert not task.is_partial
            assert "Apache-2.0" in task.licence
            for sample in task.samples:
                prompt = task.prompt(sample)
                assert (prompt.text is None) == is_chat
                assert prompt.num_fewshot == task.num_fewshot
                last = prompt.text if prompt.text is not None else prompt.turns[-1].content
                assert sample.question in last
                bare = task.prompt(sample, 0)
                assert sample.question in (bare.text if bare.text is not None else bare.turns[-1].content)
            assert (task.kind == "generate") == (task.choices == ())


def test_limit_and_subjects_make_a_partial_task() -> None:
    task = make_task("ceval", data_dir="sample", limit=2)
    assert task.is_partial
    assert len(task.samples) == 8
    assert {sample.index for sample in task.samples} == {0, 1}
    chosen = make_task("ceval", data_dir="sample", subjects=["high_school_biology"])
    assert chosen.is_partial
    assert len(chosen.samples) == 15
    assert not make_task(
        "ceval", data_dir="sample", subjects=list(dict.fromkeys(s.subject for s in task.samples))
    ).is_partial


def test_hashes_tell_data_and_prompts_apart() -> None:
    whole = make_task("mmlu", protocol="few_shot_direct", data_dir="sample", is_chat=False)
    again = make_task("mmlu", protocol="few_shot_direct", data_dir="sample", is_chat=False)
    fewer = make_task("mmlu", protocol="few_shot_direct", data_dir="sample", is_chat=False, num_fewshot=4)
    chat = make_task("mmlu", protocol="few_shot_direct", data_dir="sample")
    part = make_task("mmlu", protocol="few_shot_direct", data_dir="sample", is_chat=False, limit=3)
    assert (whole.data_hash, whole.prompt_hash) == (again.data_hash, again.prompt_hash)
    assert whole.data_hash == fewer.data_hash == chat.data_hash != part.data_hash
    assert len({whole.prompt_hash, fewer.prompt_hash, chat.prompt_hash, part.prompt_hash}) == 4
    assert whole.protocol_version == "few_shot_direct/1"


def test_two_stage_hash_covers_the_second_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation.benchmarks import ceval

    before = make_task("ceval", data_dir="sample").prompt_hash
    monkeypatch.setattr(ceval, "EXTRACTION_CUE", "\n所以选：")
    assert make_task("ceval", data_dir="sample").prompt_hash != before


def test_prompts_have_names() -> None:
    text, chat = Prompt(text="a"), Prompt(turns=(Message("user", "a"),))
    assert hash_prompt(text) == hash_prompt(Prompt(text="a"))
    assert len({hash_prompt(text), hash_prompt(chat), hash_prompt(Prompt(text="b"))}) == 3
    assert len(hash_prompt(text)) == 16


def test_sample_set_description_is_checked(tmp_path: Path) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    (folder / "logic_val.csv").write_text("id,question,A,B,C,D,answer\n0,q,a,b,c,d,A\n", encoding="utf-8")
    (tmp_path / "sample_set.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        GlmtuneError, match=r"sample_set.json: this description of a sample set cannot be read"
    ):
        make_task("ceval", data_dir=tmp_path)


def test_evaluation_needs_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from evaluation.benchmarks.tasks import make_task; import evaluation.metrics;"
        " task = make_task('ceval', data_dir='sample'); task.prompt_hash;"
        " sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_answers_are_no_answers() -> None:
    task = make_task("bbh", data_dir="sample")
    assert task.answers(task.samples[0]) == {}
    with pytest.raises(AssertionError, match="has one stage only"):
        task.extraction_prompt(task.samples[0], "")
