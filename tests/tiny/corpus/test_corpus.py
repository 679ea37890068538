"""The corpus: the same for the same seed, every skill in it, answers that are right."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from glmtune.errors import ConfigError
from glmtune.tiny.corpus import ads, ads_style, chat_style, preference
from glmtune.tiny.corpus.arithmetic import add_columns, divide_columns, multiply_columns, subtract_columns
from glmtune.tiny.corpus.mix import MIX, draw, stream, write
from glmtune.tiny.corpus.sample import lexicon
from glmtune.tiny.exam import exam, is_right
from glmtune.tiny.generated import resolve_generated

TAUGHT_ROWS = "2a3bb8fe895b9f54a304bca8fd0e9f4987fd7aa01487746ecedd6dfe99440c36"
REPO = Path(__file__).resolve().parents[3]


def test_rows_are_those_the_shipped_model_was_trained_on():
    digest = hashlib.sha256()
    for index in range(3000):
        # What messages say of tools is newer than the model, and says nothing here.
        digest.update(repr(draw(0, index)).replace(", is_call=False, tools='', has_loss=True", "").encode())
    assert digest.hexdigest() == TAUGHT_ROWS


def test_a_row_does_not_depend_on_the_ones_before_it():
    assert draw(0, 700) == list(stream(0, 701))[700]
    assert draw(0, 700) != draw(1, 700)
    assert draw(0, 700) != draw(0, 700, salt="validation")


def test_every_skill_occurs_about_as_often_as_the_mix_says():
    counts = Counter(sample.skill for sample in stream(3, 4000))
    total = sum(weight for _, weight in MIX.values())
    for skill, (_, weight) in MIX.items():
        assert abs(counts[skill] / 4000 - weight / total) < 0.03


def test_reference_answers_pass_the_exam():
    for sample in exam(60):
        if sample.skill != "ads":
            assert is_right(sample, sample.messages[-1].content), sample


def test_sums_are_right():
    for index in range(300):
        sample = MIX["arithmetic"][0](Random(index))
        for equation in sample.messages[-1].content.replace("，", ",").split(","):
            left, _, right = equation.strip(" 个十百千位。").partition("=")
            right = right.split("。")[0].split(".")[0]
            if right.isdigit() and not left.strip("0123456789+-×÷*/"):
                assert eval(left.replace("×", "*").replace("÷", "/")) == int(right), equation
    assert add_columns(99, 1) == "个位9+1=10，十位9+0+1=10"
    assert subtract_columns(100, 1, zh=False) == "ones 10-1=9, tens 10-1-0=9, hundreds 1-1-0=0"
    assert multiply_columns(12, 3) == "个位2×3=6，十位1×3=3"
    assert divide_columns(120, 4, zh=False) == "12/4=3, 0/4=0"


def test_special_clauses_name_their_value():
    for values in lexicon("ads")["values"].values():
        for value, clauses in values.items():
            assert all(value in clause for clause in clauses), value


def test_advertisements_name_every_value():
    for index in range(200):
        pairs = ads.draw_attributes(Random(index))
        for write_text in (ads.advertisement, ads.long_advertisement):
            text = write_text(Random(index), list(pairs))
            assert all(value in text for _, value in pairs[1:]), (pairs, text)


def test_written_rows_are_conversations(tmp_path: Path):
    write(tmp_path / "rows.jsonl", seed=0, count=50)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 50
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)


def test_generated_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_generated(None) is None
    assert resolve_generated("my.jsonl") == "my.jsonl"
    path = resolve_generated("generated:glm-tiny/train/7")
    assert path is not None
    assert len(Path(path).read_text(encoding="utf-8").splitlines()) == 7
    with pytest.raises(ConfigError, match=r"generated:glm-tiny/tset/7.*generated:glm-tiny/train/ROWS"):
        resolve_generated("generated:glm-tiny/tset/7")


def test_shipped_files_are_what_the_generators_write(tmp_path: Path):
    ads_style.write(tmp_path / "ads")
    chat_style.write(tmp_path / "chat")
    preference.write(tmp_path / "preference")
    for name in ("ads/train", "ads/dev", "chat/train", "chat/dev", "preference/train", "preference/dev"):
        made = (tmp_path / f"{name}.jsonl").read_bytes()
        assert made == (REPO / "data" / f"{name}.jsonl").read_bytes(), name


def test_shipped_advertisements_do_not_repeat():
    ads_train, ads_dev = ads_style.rows("train", 300), ads_style.rows("dev", 200)
    contents = [row["content"] for row in ads_train + ads_dev]
    assert len(set(contents[:300])) == 300
    assert all("：1." in row["summary"] for row in ads_train)


def test_the_shipped_styles_are_made_of_characters_that_the_base_can_write():
    """A prefix cannot teach the frozen head a character: with rare ones tuning showed nothing of the style."""
    written = Counter[str]()
    for sample in stream(0, 2_000):
        written.update(sample.messages[-1].content if sample.messages else sample.text)
    points = [text.format(v="") for text in ads_style.POINTS.values()]
    style = "".join([*ads_style.HEADLINES.values(), *points, *ads_style.CLOSINGS.values(), "：；。，.12345"])
    shop = "".join(str(row["response"]) for row in chat_style.rows("train", 600))
    assert {character: written[character] for character in style + shop if written[character] < 20} == {}


def test_the_worse_advertisement_is_not_told_by_its_length():
    rows = preference.rows("test", 200)
    assert len({row["prompt"] for row in rows}) == 200
    lengths = [(len(row["chosen"]), len(row["rejected"])) for row in rows]
    longer = sum(better > worse for better, worse in lengths)
    assert 50 < longer < 150
    better, worse = (sum(side) / len(rows) for side in zip(*lengths, strict=True))
    assert 0.85 < better / worse < 1.15
