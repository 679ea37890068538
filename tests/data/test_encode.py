"""Rows equal the official ones where nothing is cut, and are cut turn by turn where something must be."""

from __future__ import annotations

import json

import pytest

from glmtune.data.encode import encode_prompt_row, encode_reference_row, encode_training_row
from glmtune.data.records import Conversation, RowProblem
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError
from glmtune.labels import IGNORE_INDEX
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder

FRAME = len("[Round 1]\n\n问：\n\n答：") + 2


def settings(source: int = 1000, target: int = 1000, **more: object) -> DataSettings:
    return DataSettings(max_source_length=source, max_target_length=target, **more)


def shown(tokenizer, row) -> tuple[str, str]:
    """Text of the ids and, aligned with it, of the labels."""
    labels = [label if label != IGNORE_INDEX else 0x110001 for label in row.labels]
    return tokenizer.show(row.input_ids), tokenizer.show(labels)


# ---- the official rows ----


def official_cases(oracles, request, name: str) -> tuple[object, dict]:
    case = json.loads((oracles / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))["finetune"]
    if name == "v2":
        folder = request.getfixturevalue("released_tokenizers") / "chatglm2-6b"
    else:
        folder = oracles / "tokenizers" / "tiny_v2"
    return load_tokenizer_folder(folder, Family.CHATGLM2), case


@pytest.mark.parametrize(
    ("name", "history", "expected"),  # expected: the examples that fit the limits
    [
        ("v2", "without_history", [0, 1, 2]),
        ("v2", "with_history", [0]),
        ("tiny_v2", "without_history", [1]),
        ("tiny_v2", "with_history", []),
    ],
)
def test_rows_equal_the_official_ones(oracles, request, name: str, history: str, expected: list[int]) -> None:
    tokenizer, case = official_cases(oracles, request, name)
    limits = settings(case["max_source_length"], case["max_target_length"])
    compared = []
    for number in range(3):  # the fourth example has no prompt; the official script leaves it out
        pairs = case["examples"]["history"][number] if history == "with_history" else []
        messages = [part for q, a in pairs for part in (Message("user", q), Message("assistant", a))]
        answer = case["examples"]["summary"][number]
        messages += [Message("user", case["examples"]["content"][number]), Message("assistant", answer)]
        conversation = Conversation(tuple(messages), "rows", number + 1)
        (row,) = encode_training_row(tokenizer, conversation, limits)
        train, evaluation = case[history]["train"], case[history]["eval"]
        assert evaluation["labels"][number] == encode_reference_row(
            tokenizer, answer, limits.max_target_length
        )
        if row.dropped_turns or row.cut_question_tokens:  # the official script cuts the prompt's ids instead
            whole = encode_prompt_row(tokenizer, conversation, settings()).input_ids[
                : limits.max_source_length
            ]
            learnt = [label for label in row.labels if label != IGNORE_INDEX]
            assert train["input_ids"][number][: len(whole) + len(learnt)] == whole + learnt
            continue
        compared.append(number)
        length = len(row.input_ids)
        assert row.input_ids == train["input_ids"][number][:length]
        assert row.labels == [
            label if label != -100 else IGNORE_INDEX for label in train["labels"][number][:length]
        ]
        assert set(train["input_ids"][number][length:]) <= {0}
        real = [
            token
            for token, mask in zip(
                evaluation["input_ids"][number], evaluation["attention_mask"][number], strict=True
            )
            if mask
        ]
        assert encode_prompt_row(tokenizer, conversation, limits).input_ids == real
    assert compared == expected


@pytest.mark.parametrize("name", ["v2", "tiny_v2"])
def test_source_prefix_stands_before_the_whole_prompt(oracles, request, name: str, talk) -> None:
    tokenizer, _ = official_cases(oracles, request, name)
    row = encode_prompt_row(tokenizer, talk("写一首诗", "好"), settings(source_prefix="翻译："))
    expected = tokenizer("翻译：[Round 1]\n\n问：写一首诗\n\n答：")["input_ids"]
    assert row.input_ids == expected


def test_chatglm3_rows_with_the_released_tokenizer(released_tokenizers, talk) -> None:
    tokenizer = load_tokenizer_folder(released_tokenizers / "chatglm2-6b", Family.CHATGLM3)
    conversation = talk("你好", "你好！", "再见", "再见！")
    (last,) = encode_training_row(tokenizer, conversation, settings())
    (every,) = encode_training_row(tokenizer, conversation, settings(loss_on="all_turns"))
    assert last.input_ids == every.input_ids
    assert last.input_ids[:3] == [64790, 64792, 64795]
    assert last.input_ids[-1] == tokenizer.end_id
    learnt = [token for token in every.labels if token != IGNORE_INDEX]
    assert 64795 in learnt  # the question that follows ends the first answer
    assert 64796 not in learnt


@pytest.mark.parametrize("name", ["v1", "tiny_v1"])
@pytest.mark.parametrize("history", ["without_history", "with_history"])
def test_rows_of_chatglm_equal_the_official_ones(oracles, request, name: str, history: str) -> None:
    """Rows of its training script, except where that script cuts: it cuts ids, we cut turns and characters.

    With a history column that script numbers rounds even where a row has no history; its evaluation, the chat
    and we do not.
    """
    case = json.loads((oracles / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))["finetune"]
    released = name == "v1"
    folder = (
        request.getfixturevalue("released_tokenizers") / "chatglm-6b"
        if released
        else oracles / "tokenizers" / name
    )
    tokenizer = load_tokenizer_folder(folder, Family.CHATGLM)
    limits = settings(case["max_source_length"], case["max_target_length"])
    whole = []
    for number in range(3):
        pairs = case["examples"]["history"][number] if history == "with_history" else []
        messages = [part for q, a in pairs for part in (Message("user", q), Message("assistant", a))]
        answer = case["examples"]["summary"][number]
        messages += [Message("user", case["examples"]["content"][number]), Message("assistant", answer)]
        conversation = Conversation(tuple(messages), "rows", number + 1)
        (row,) = encode_training_row(tokenizer, conversation, limits)
        train, evaluation = case[history]["train"], case[history]["eval"]
        ids, labels = train["input_ids"][number], train["labels"][number]
        assert (
            encode_reference_row(tokenizer, answer, limits.max_target_length) == evaluation["labels"][number]
        )
        learnt = [label for label in row.labels if label != IGNORE_INDEX]
        assert learnt == [label for label in labels if label != IGNORE_INDEX]
        assert learnt[0] == tokenizer.bos_token_id
        assert len(row.input_ids) <= limits.max_source_length + limits.max_target_length
        if row.dropped_turns or row.cut_question_tokens or (history == "with_history" and not pairs):
            continue
        whole.append(number)
        length = len(row.input_ids)
        assert (row.input_ids, row.labels) == (ids[:length], labels[:length])
        assert set(ids[length:]) <= {tokenizer.pad_token_id}
    assert whole == ([0, 1, 2] if history == "without_history" else [])


# ---- what carries loss ----


def test_chatglm_learns_the_start_of_the_answer_too(chatglm, talk) -> None:
    (row,) = encode_training_row(chatglm, talk("q", "ab"), settings())
    assert chatglm.show(row.input_ids) == "q__ab$"
    assert row.labels == [IGNORE_INDEX, IGNORE_INDEX, *row.input_ids[2:]]
    rows = encode_training_row(chatglm, talk("q", "a", "r", "b"), settings(loss_on="all_turns"))
    assert [chatglm.show(row.input_ids) for row in rows] == [
        "q__a$",
        "[Round 0]\n问：q\n答：a\n[Round 1]\n问：r\n答：__b$",
    ]


def test_limits_of_chatglm_count_as_its_script_does(chatglm, talk) -> None:
    """Source: text and gMASK. Target: sop, text and eop."""
    (row,) = encode_training_row(chatglm, talk("q" * 9, "a" * 9), settings(8, 6))
    assert chatglm.show(row.input_ids) == "qqqqqqq__aaaa$"
    assert (row.cut_question_tokens, row.cut_answer_tokens) == (2, 5)
    (row,) = encode_training_row(chatglm, talk("q" * 7, "a" * 4), settings(8, 6))
    assert (row.cut_question_tokens, row.cut_answer_tokens) == (0, 0)
    assert encode_reference_row(chatglm, "a" * 9, 6) == [*[ord("a")] * 4, *chatglm.suffix_ids]
    prefixed = encode_prompt_row(chatglm, talk("q", "a"), settings(source_prefix="P:"))
    assert chatglm.show(prefixed.input_ids) == "P:q__"
    with pytest.raises(RowProblem, match=r"max_source_length` = 1 tokens.*take 1 tokens.*above 1"):
        encode_prompt_row(chatglm, talk("q", "a"), settings(1))


def test_chatglm_refuses_what_its_context_would_see(chatglm, talk) -> None:
    for setting, error in (
        ({"loss_on": "everything"}, r"data.loss_on` is `everything`.*ChatGLM-6B.*both directions"),
        ({"packing": True, "packing_length": 4000}, r"data.packing` is true.*ChatGLM-6B.*data.packing=false"),
    ):
        with pytest.raises(ConfigError, match=error):
            encode_training_row(chatglm, talk("q", "a"), settings(**setting))


def test_rows_of_glm4_end_with_its_end_token(oracles, talk) -> None:
    tokenizer = load_tokenizer_folder(oracles / "tokenizers" / "tiny_glm4", Family.GLM4)
    (row,) = encode_training_row(tokenizer, talk("你好", "你好！"), settings(loss_on="all_turns"))
    ids = tokenizer.convert_tokens_to_ids
    head = [
        ids("[gMASK]"),
        ids("<sop>"),
        ids("<|user|>"),
        *tokenizer.text_ids("\n"),
        *tokenizer.text_ids("你好"),
    ]
    answer = [*tokenizer.text_ids("\n"), *tokenizer.text_ids("你好！"), ids("<|endoftext|>")]
    assert row.input_ids == [*head, ids("<|assistant|>"), *answer]
    assert row.labels == [*[IGNORE_INDEX] * (len(head) + 1), *answer]


def test_loss_on_the_last_answer(chatglm2, talk) -> None:
    (row,) = encode_training_row(chatglm2, talk("q", "a", "r", "bc"), settings())
    text, learnt = shown(chatglm2, row)
    assert text == "__[Round 1]\n\n问：q\n\n答：a\n\n[Round 2]\n\n问：r\n\n答：bc$"
    assert learnt == "_" * (len(text) - 3) + "bc$"


def test_everything_is_learnt_where_asked(chatglm2, talk) -> None:
    (row,) = encode_training_row(chatglm2, talk("q", "a", "r", "bc"), settings(loss_on="everything"))
    assert row.labels == row.input_ids
    assert shown(chatglm2, row)[0].endswith("问：r\n\n答：bc$")


def test_chatglm2_learns_every_turn_in_a_row_of_its_own(chatglm2, talk) -> None:
    rows = encode_training_row(chatglm2, talk("q", "a", "r", "bc"), settings(loss_on="all_turns"))
    assert [shown(chatglm2, row)[0] for row in rows] == [
        "__[Round 1]\n\n问：q\n\n答：a$",
        "__[Round 1]\n\n问：q\n\n答：a\n\n[Round 2]\n\n问：r\n\n答：bc$",
    ]
    assert [shown(chatglm2, row)[1].strip("_") for row in rows] == ["a$", "bc$"]


def test_chatglm3_learns_every_turn_in_one_row(chatglm3, talk) -> None:
    (row,) = encode_training_row(
        chatglm3, talk("q", "a", "r", "bc", system="s"), settings(loss_on="all_turns")
    )
    assert shown(chatglm3, row)[0] == "___\ns_\nq_\na_\nr_\nbc$"
    carried = [token for token in row.labels if token != IGNORE_INDEX]
    assert chatglm3.show(carried) == "\na_\nbc$"


def test_source_prefix_without_prompt_text_goes_to_the_first_question(chatglm3, talk) -> None:
    rows = [
        encode_training_row(chatglm3, talk("q", "a", "r", "b"), settings(source_prefix="P:", loss_on=loss_on))
        for loss_on in ("answer", "all_turns")
    ]
    assert {shown(chatglm3, row)[0] for (row,) in rows} == {"___\nP:q_\na_\nr_\nb$"}


# ---- truncation ----


def test_nothing_is_cut_at_the_exact_length(chatglm2, talk) -> None:
    (row,) = encode_training_row(chatglm2, talk("question", "answer"), settings(FRAME + 8, 6))
    assert (row.dropped_turns, row.cut_question_tokens, row.cut_answer_tokens) == (0, 0, 0)


def test_answer_is_cut_and_keeps_its_end(chatglm2, talk) -> None:
    (row,) = encode_training_row(chatglm2, talk("q", "abcdef"), settings(target=4))
    assert shown(chatglm2, row)[1].strip("_") == "abcd$"
    assert row.cut_answer_tokens == 2


def test_oldest_turns_go_first_and_rounds_are_numbered_anew(chatglm2, talk) -> None:
    conversation = talk("one", "1", "two", "2", "three", "3", system="S")
    whole = encode_prompt_row(chatglm2, conversation, settings())
    fitted = encode_prompt_row(chatglm2, conversation, settings(len(whole.input_ids) - 1))
    assert (
        chatglm2.show(fitted.input_ids)
        == "__S\n\n[Round 1]\n\n问：two\n\n答：2\n\n[Round 2]\n\n问：three\n\n答："
    )
    assert (fitted.dropped_turns, fitted.cut_question_tokens) == (1, 0)
    least = encode_prompt_row(chatglm2, conversation, settings(FRAME + 8))
    assert chatglm2.show(least.input_ids) == "__S\n\n[Round 1]\n\n问：three\n\n答："
    assert least.dropped_turns == 2


@pytest.mark.parametrize("limit", range(24, 60))
def test_every_limit_is_used_as_well_as_whole_turns_allow(chatglm2, talk, limit: int) -> None:
    texts = ["q" * 5, "a" * 7, "r" * 3, "b" * 9, "s" * 4, "c"]
    fitted = encode_prompt_row(chatglm2, talk(*texts), settings(limit))
    assert len(fitted.input_ids) <= limit
    more = talk(*texts[2 * max(0, fitted.dropped_turns - 1) :])
    assert not fitted.dropped_turns or len(encode_prompt_row(chatglm2, more, settings()).input_ids) > limit


def test_question_is_cut_at_its_end_and_the_generation_prompt_stays(chatglm2, talk) -> None:
    (row,) = encode_training_row(chatglm2, talk("old", "old", "abcdefgh", "x"), settings(FRAME + 5))
    assert shown(chatglm2, row)[0] == "__[Round 1]\n\n问：abcde\n\n答：x$"
    assert (row.dropped_turns, row.cut_question_tokens) == (1, 3)


def test_a_very_long_question_is_cut_quickly(chatglm2, talk) -> None:
    fitted = encode_prompt_row(chatglm2, talk("x" * 200_000, "a"), settings(64))
    assert len(fitted.input_ids) == 64


def test_cut_questions_with_the_released_tokenizer(released_tokenizers, talk) -> None:
    tokenizer = load_tokenizer_folder(released_tokenizers / "chatglm2-6b", Family.CHATGLM2)
    question = "类型#裤*版型#宽松*风格#性感*图案#线条*裤型#阔腿裤😀" * 5
    for limit in range(17, 60):
        fitted = encode_prompt_row(tokenizer, talk(question, "a"), settings(limit))
        text = tokenizer.decode(fitted.input_ids)
        assert limit - 4 <= len(fitted.input_ids) <= limit
        assert text.endswith("\n\n答：")
        assert "\ufffd" not in text


def test_tool_results_are_cut_before_the_question(chatglm3) -> None:
    messages = (
        Message("user", "weather?"),
        Message("assistant", "call()", "tool"),
        Message("observation", "sunny and warm"),
        Message("assistant", "Sunny."),
    )
    conversation = Conversation(messages, "rows", 1)
    whole = encode_prompt_row(chatglm3, conversation, settings())
    cut = encode_prompt_row(chatglm3, conversation, settings(len(whole.input_ids) - 9))
    assert cut.messages[2].content == "sunny"
    shorter = encode_prompt_row(chatglm3, conversation, settings(len(whole.input_ids) - 16))
    assert (shorter.messages[2].content, shorter.messages[0].content) == ("s", "weath")


def test_limits_below_the_template_are_refused_with_the_number_needed(chatglm2, talk) -> None:
    with pytest.raises(
        RowProblem, match=rf"max_source_length` = {FRAME}.*take {FRAME} tokens.*above {FRAME}"
    ):
        encode_prompt_row(chatglm2, talk("question", "a"), settings(FRAME))
    assert encode_prompt_row(chatglm2, talk("question", "a"), settings(FRAME + 1)).messages[0].content == "q"


def test_what_the_template_cannot_say_is_a_bad_row(chatglm2) -> None:
    messages = (Message("user", "q"), Message("observation", "o"), Message("assistant", "a"))
    with pytest.raises(RowProblem, match="observation"):
        encode_training_row(chatglm2, Conversation(messages, "rows", 1), settings())


@pytest.mark.parametrize("loss_on", ["answer", "all_turns"])
def test_plain_text_is_learnt_from_its_first_token(chatglm2, chatglm3, loss_on: str) -> None:
    text = Conversation((Message("assistant", "text"),), "rows", 1)
    (row,) = encode_training_row(chatglm2, text, settings(loss_on=loss_on))
    assert shown(chatglm2, row) == ("__text$", "__text$")
    (row,) = encode_training_row(chatglm3, text, settings(loss_on=loss_on))
    assert shown(chatglm3, row)[0] == "__\ntext$"
