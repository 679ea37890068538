"""Preference pairs and judged answers: the usual layouts give the same rows, and what cannot be compared is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from glmtune.data.check import check_data
from glmtune.data.conversations import load_conversations
from glmtune.data.dataset import load_split
from glmtune.data.records import Conversation
from glmtune.data.settings import DataSettings
from glmtune.errors import ConfigError, DataError
from glmtune.labels import IGNORE_INDEX
from glmtune.messages import Message

QUESTION, GOOD, BAD = "你好，今天想去哪里？", "晚上睡不着。", "一共有8个。"
USER, BETTER, WORSE = Message("user", QUESTION), Message("assistant", GOOD), Message("assistant", BAD)


def said(
    *texts: str, keys: tuple[str, str] = ("role", "content"), user: str = "user"
) -> list[dict[str, str]]:
    """Return messages of user and assistant in turn."""
    roles = (user, "gpt" if user == "human" else "assistant")
    return [{keys[0]: roles[place % 2], keys[1]: text} for place, text in enumerate(texts)]


def answer(text: str, keys: tuple[str, str] = ("role", "content"), role: str = "assistant") -> dict[str, str]:
    return {keys[0]: role, keys[1]: text}


SHAREGPT = ("from", "value")
PAIRS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "question": {"question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "TRL, messages": {"prompt": said(QUESTION), "chosen": [answer(GOOD)], "rejected": [answer(BAD)]},
    "TRL, no prompt": {"chosen": said(QUESTION, GOOD), "rejected": said(QUESTION, BAD)},
    "UltraFeedback": {
        "prompt": QUESTION,
        "chosen": said(QUESTION, GOOD),
        "rejected": said(QUESTION, BAD),
        "score_chosen": 8.0,
    },
    "LLaMA-Factory": {
        "conversations": said(QUESTION, keys=SHAREGPT, user="human"),
        "chosen": answer(GOOD, SHAREGPT, "gpt"),
        "rejected": answer(BAD, SHAREGPT, "gpt"),
    },
    "alpaca": {"instruction": QUESTION, "input": "", "chosen": GOOD, "rejected": BAD},
    "ms-swift": {"messages": said(QUESTION, GOOD), "rejected_response": BAD},
    "table": {
        "prompt": QUESTION,
        "chosen": json.dumps(said(QUESTION, GOOD)),
        "rejected": json.dumps(said(QUESTION, BAD)),
    },
}
JUDGED: dict[str, dict[str, Any]] = {
    "texts": {"prompt": QUESTION, "completion": GOOD, "label": True},
    "a number": {"prompt": QUESTION, "completion": GOOD, "label": 1},
    "a word": {"prompt": QUESTION, "completion": GOOD, "label": "True"},
    "TRL, messages": {"prompt": said(QUESTION), "completion": [answer(GOOD)], "label": True},
    "ms-swift": {"messages": said(QUESTION, GOOD), "label": True},
    "LLaMA-Factory": {"instruction": QUESTION, "output": GOOD, "kto_tag": True},
}


def read(folder: Path, *rows: Mapping[str, Any], **settings: Any) -> list[Conversation]:
    return list(load_conversations(settings_of(folder, *rows, **settings), "train").conversations)


def settings_of(folder: Path, *rows: Mapping[str, Any], **settings: Any) -> DataSettings:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return DataSettings(**{"layout": "preference", "train_file": str(file), **settings})


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_every_layout(name: str, tmp_path: Path) -> None:
    [row] = read(tmp_path, PAIRS[name])
    assert (row.messages, row.rejected, row.desirable) == ((USER, BETTER), WORSE, None)


@pytest.mark.parametrize("name", JUDGED)
def test_judged_answers_of_every_layout(name: str, tmp_path: Path) -> None:
    [row] = read(tmp_path, JUDGED[name])
    assert (row.messages, row.rejected, row.desirable) == ((USER, BETTER), None, True)
    label = next(key for key in ("label", "kto_tag") if key in JUDGED[name])
    [other] = read(tmp_path, {**JUDGED[name], label: False})
    assert other.desirable is False


def test_named_columns_system_and_history(tmp_path: Path) -> None:
    row = {"q": QUESTION, "good": GOOD, "bad": BAD, "system": "s", "history": [["a", "b"]]}
    names = {"prompt_column": "q", "response_column": "good", "rejected_column": "bad"}
    [found] = read(tmp_path, row, **names)
    assert found.messages == (
        *(Message("system", "s"), Message("user", "a"), Message("assistant", "b")),
        *(USER, BETTER),
    )
    assert found.rejected == WORSE
    with pytest.raises(DataError, match=r"the column `worse` does not occur; the columns are: q, good"):
        read(tmp_path, row, **{**names, "rejected_column": "worse"})


def test_an_answer_may_be_json(tmp_path: Path) -> None:
    [row] = read(tmp_path, {"prompt": QUESTION, "chosen": '[{"a": 1}]', "rejected": "{}"})
    assert (row.messages[-1].content, row.rejected) == ('[{"a": 1}]', Message("assistant", "{}"))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        pytest.param(
            {**PAIRS["texts"], "rejected": GOOD}, "the same answer, so neither is preferred", id="same"
        ),
        pytest.param({**PAIRS["texts"], "rejected": " "}, r"`rejected` \(the answer\) is empty", id="empty"),
        pytest.param(
            {"chosen": said(QUESTION, GOOD), "rejected": said("Hi", BAD)},
            r"differ before their last answers \(2 and 2 messages\)",
            id="other prompts",
        ),
        pytest.param(
            {"chosen": said(QUESTION, GOOD), "rejected": said(QUESTION, BAD, "and?", BAD)},
            r"differ before their last answers \(2 and 4 messages\)",
            id="longer",
        ),
        pytest.param(
            {**JUDGED["texts"], "label": "maybe"}, r"`label` is a string \('maybe'\)", id="no truth"
        ),
        pytest.param({**JUDGED["texts"], "label": None}, "`label` is missing", id="no label"),
    ],
)
def test_rows_that_cannot_be_compared(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    good = PAIRS["texts"] if "rejected" in row else JUDGED["texts"]
    if "prompt" not in row:
        good = PAIRS["TRL, no prompt"]
    with pytest.raises(DataError, match=problem):
        read(tmp_path, good, row)
    assert len(read(tmp_path, good, row, on_bad_row="skip")) == 1


@pytest.mark.parametrize(
    ("row", "settings", "problem"),
    [
        pytest.param({"prompt": "a", "response": "b"}, {}, "no preferences can be told", id="one answer"),
        pytest.param({"chosen": "a", "rejected": "b"}, {}, "no preferences can be told", id="no prompt"),
        pytest.param(
            PAIRS["texts"], {"layout": "auto"}, r"preference pairs, which `\+recipe=dpo`", id="auto"
        ),
    ],
)
def test_files_without_preferences(
    row: dict[str, Any], settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=problem):
        read(tmp_path, row, **settings)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"packing": True}, "both of a pair must be in one batch"),
        ({"loss_on": "all_turns"}, "`data.loss_on` is `all_turns`"),
        (
            {"streaming": True, "max_source_length": 8, "max_target_length": 8},
            "with a reference that is made of all rows",
        ),
        ({"mix": [{"name": "a", "train_file": "a"}, {"name": "b", "train_file": "b"}]}, "not mixed"),
    ],
    ids=["packing", "all_turns", "streaming", "mix"],
)
def test_settings_that_pairs_exclude(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DataSettings(layout="preference", **values)


def test_a_mixture_and_other_layouts_take_no_pairs() -> None:
    sets = [{"name": "a", "train_file": "a", "layout": "preference"}, {"name": "b", "train_file": "b"}]
    with pytest.raises(ConfigError, match="has a set with the layout `preference`"):
        DataSettings(mix=sets)
    with pytest.raises(ConfigError, match=r"`data.rejected_column` is `bad`, but `data.layout` is `auto`"):
        DataSettings(rejected_column="bad")


# ---- encoded


def test_a_pair_is_two_rows_to_one_prompt(tiny_tokenizer: Any, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, PAIRS["texts"], {**PAIRS["texts"], "prompt": "还有吗？"})
    split = load_split(settings, "train", tiny_tokenizer)
    assert (len(split.rows), split.num_conversations) == (4, 2)
    assert split.desirable.tolist() == [True, False] * 2
    prompts = []
    for row in split.rows:
        start = next(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
        assert row["labels"][start:] == row["input_ids"][start:]
        prompts.append(row["input_ids"][:start])
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    kept = load_split(
        DataSettings(**{**vars_of(settings), "cache": "always", "cache_dir": str(tmp_path / "cache")}),
        "train",
        tiny_tokenizer,
    )
    again = load_split(kept.settings, "train", tiny_tokenizer)
    for each in (kept, again):
        assert each.rows["input_ids"][:] == split.rows["input_ids"][:]
        assert each.desirable.tolist() == split.desirable.tolist()
        assert each.sample == split.sample
        assert each.fingerprint == split.fingerprint


def vars_of(settings: DataSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_the_fingerprint_tells_which_answer_is_better(tiny_tokenizer: Any, tmp_path: Path) -> None:
    turned = {"prompt": QUESTION, "chosen": BAD, "rejected": GOOD}
    rows: list[dict[str, Any]] = [
        PAIRS["texts"],
        turned,
        {"prompt": QUESTION, "chosen": GOOD, "rejected": "!"},
    ]
    rows += [JUDGED["texts"], {**JUDGED["texts"], "label": False}]
    found = [load_split(settings_of(tmp_path, row), "train", tiny_tokenizer).fingerprint for row in rows]
    assert len(set(found)) == len(rows)


def test_answers_that_are_cut_to_the_same_are_refused(tiny_tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": QUESTION, "chosen": "This is a long text, A", "rejected": "This is a long text, B"}
    settings = settings_of(tmp_path, PAIRS["texts"], row, max_source_length=64, max_target_length=3)
    with pytest.raises(DataError, match=r"its two answers are the same.*`data.max_target_length` = 3"):
        load_split(settings, "train", tiny_tokenizer)


def test_check_shows_pairs(tiny_tokenizer: Any, tmp_path: Path) -> None:
    long = {"prompt": "Hi", "chosen": GOOD * 3, "rejected": BAD}
    report = check_data(
        settings_of(tmp_path, PAIRS["texts"], long, {**long, "rejected": GOOD * 3}), tiny_tokenizer
    )
    [split] = report.splits
    judged = split.judged
    assert judged is not None
    assert (split.num_rows, split.num_training_rows, split.num_bad_rows, judged.num_pairs) == (2, 4, 1, 2)
    assert split.layout == "preference"
    assert split.columns == ("prompt", "chosen", "rejected")
    assert judged.num_longer == 1
    assert judged.desirable_tokens is not None
    assert (judged.desirable_tokens.mean, judged.desirable_tokens.max) == (8.0, 12)
    better, worse = (
        "".join(part.text for part in parts) for parts in (report.sample, report.rejected_sample)
    )
    assert GOOD in better
    assert BAD in worse
    single = check_data(
        settings_of(tmp_path, JUDGED["texts"], {**JUDGED["texts"], "label": 0}), tiny_tokenizer
    )
    found = single.splits[0].judged
    assert found is not None
    assert (found.num_pairs, found.num_desirable, found.num_undesirable) == (0, 1, 1)
    assert single.rejected_sample == ()
