"""Prompts and references of a split, the references cut as the official evaluation cuts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmtune.data.dataset import load_conversations
from glmtune.data.settings import DataSettings
from glmtune.errors import DataError
from glmtune.inference.predict.questions import build_questions, cut_reference

ANSWER = "这条裙子颜色很白，面料柔软，穿着舒服。"


def settings(tmp_path, rows, **values):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return DataSettings(test_file=str(path), **values)


def questions(tokenizer, data):
    return build_questions(tokenizer, load_conversations(data, "test", need_answers=False), data)


def test_prompt_is_what_the_model_reads(tiny_tokenizer, tmp_path):
    data = settings(tmp_path, [{"content": "类型#裙", "summary": ANSWER}])
    (question,) = questions(tiny_tokenizer, data)
    assert question.prompt == "[Round 1]\n\n问：类型#裙\n\n答："
    assert tiny_tokenizer.decode(list(question.input_ids), skip_special_tokens=True) == question.prompt
    assert (question.row, question.reference, question.full_reference) == (0, ANSWER, None)


def test_source_prefix_is_part_of_the_prompt(tiny_tokenizer, tmp_path):
    data = settings(tmp_path, [{"content": "类型#裙", "summary": ANSWER}], source_prefix="写一段广告。")
    assert questions(tiny_tokenizer, data)[0].prompt == "写一段广告。[Round 1]\n\n问：类型#裙\n\n答："


def test_long_prompts_and_references_are_cut(tiny_tokenizer, tmp_path):
    row = {"content": "颜色#白" * 40, "summary": ANSWER * 20}
    data = settings(tmp_path, [row], max_source_length=48, max_target_length=32)
    (question,) = questions(tiny_tokenizer, data)
    assert 0 < question.prompt.count("颜色#白") < 40
    assert len(question.input_ids) <= 48
    assert question.full_reference == row["summary"]
    assert row["summary"].startswith(question.reference)


def test_tokens_in_front_count_towards_the_reference(tiny_tokenizer):
    ids = tiny_tokenizer.text_ids(ANSWER)
    assert len(tiny_tokenizer.prefix_ids) == 2
    assert cut_reference(tiny_tokenizer, ANSWER, len(ids) + 2) == ANSWER
    assert cut_reference(tiny_tokenizer, ANSWER, len(ids) + 1) == tiny_tokenizer.decode(ids[:-1]).strip()


def test_references_of_chatglm_are_cleaned_like_its_answers():
    """Its vocabulary has half-width punctuation alone; the answers shown and scored have it full-width."""
    from glmtune.models.releases.families import Family
    from glmtune.models.templates.renderer import template_for
    from glmtune.models.tokenizers.load import load_tokenizer_folder

    folder = Path(__file__).parents[2] / "golden" / "tokenizers" / "chatglm"
    tokenizer = load_tokenizer_folder(folder, Family.CHATGLM)
    ids = tokenizer.text_ids("颜色很白,面料柔软!")
    cut = cut_reference(tokenizer, "颜色很白,面料柔软!", len(ids) + 2)
    assert cut == template_for(tokenizer).clean_answer(tokenizer.decode(ids)) == "颜色很白，面料柔软！"
    assert cut_reference(tokenizer, "颜色很白,面料柔软!", len(ids) + 1) == "颜色很白，面料柔软"


def test_released_tokenizer_keeps_62_of_64_tokens(released_tokenizers, benchmarks_data):
    from glmtune.models.releases.families import Family
    from glmtune.models.tokenizers.load import load_tokenizer_folder

    tokenizer = load_tokenizer_folder(released_tokenizers / "chatglm2-6b", Family.CHATGLM2)
    lines = (benchmarks_data / "adgen" / "dev.json").read_text(encoding="utf-8").splitlines()[:50]
    for summary in (json.loads(line)["summary"] for line in lines):
        expected = tokenizer.decode(tokenizer.text_ids(summary)[:62]).strip()
        assert cut_reference(tokenizer, summary, 64) == expected


def test_characters_the_tokenizer_does_not_know_stay_in_the_reference(tiny_tokenizer, monkeypatch):
    unknown = tiny_tokenizer.text_ids("裙")[-1]
    monkeypatch.setattr(type(tiny_tokenizer), "unk_token_id", unknown, raising=False)
    assert cut_reference(tiny_tokenizer, ANSWER, 200) == ANSWER
    cut = cut_reference(tiny_tokenizer, ANSWER, 12)
    assert ANSWER.startswith(cut)
    assert 0 < len(tiny_tokenizer.text_ids(cut)) <= 10


def test_questions_without_answers_have_no_reference(tiny_tokenizer, tmp_path):
    data = settings(tmp_path, [{"messages": [{"role": "user", "content": "你好"}]}])
    assert questions(tiny_tokenizer, data)[0].reference is None


def test_rows_that_cannot_fit_are_reported_or_skipped(tiny_tokenizer, tmp_path):
    rows = [{"messages": [{"role": "system", "content": "你" * 90}, {"role": "user", "content": "好"},
                          {"role": "assistant", "content": "好"}]},
            {"messages": [{"role": "user", "content": "好"}, {"role": "assistant", "content": "好"}]}]  # fmt: skip
    with pytest.raises(DataError, match=r"line 1: the prompt cannot be shortened.*64 tokens"):
        questions(tiny_tokenizer, settings(tmp_path, rows, max_source_length=64))
    kept = questions(tiny_tokenizer, settings(tmp_path, rows, max_source_length=64, on_bad_row="skip"))
    assert [question.row for question in kept] == [0]
