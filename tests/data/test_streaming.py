"""Streamed rows: those of the files, each once a pass, and the same from any place on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from glmtune.data.check import check_data
from glmtune.data.dataset import load_split
from glmtune.data.settings import DataSettings
from glmtune.data.streaming.rows import Place, StreamedRows, place_from, stream_split
from glmtune.data.streaming.shuffle import shuffled
from glmtune.errors import ConfigError, DataError
from glmtune.training.rank_batches import RankBatches
from glmtune.training.row_order import EpochSampler

COUNT = 50


@pytest.fixture
def settings(write) -> DataSettings:
    lines = [json.dumps({"prompt": f"q{n}", "response": f"a{n}"}) for n in range(COUNT)]
    first = write("one.jsonl", "\n".join(lines[:20]))
    return DataSettings(
        train_file=[first, write("two.jsonl", "\n".join(lines[20:]))],
        max_source_length=60,
        max_target_length=10,
        streaming=True,
        shuffle_buffer=8,
    )


def stream(settings: DataSettings, tokenizer: Any, **more: Any) -> StreamedRows:
    values: dict[str, Any] = {"num_rows": 3 * COUNT, "seed": 1, "shuffle": True, **more}
    return StreamedRows(settings, tokenizer, **values)


def all_rows(rows: StreamedRows, start: int = 0) -> list[tuple[int, ...]]:
    return [tuple(rows[number]["input_ids"]) for number in range(start, len(rows))]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_once_a_pass(settings, chatglm2, shuffle: bool) -> None:
    found = all_rows(stream(settings, chatglm2, shuffle=shuffle))
    loaded = load_split(replace(settings, streaming=False, shuffle_buffer=None), "train", chatglm2)
    expected = [tuple(ids) for ids in loaded.rows["input_ids"]]
    passes = [found[at : at + COUNT] for at in range(0, 3 * COUNT, COUNT)]
    assert all(Counter(one) == Counter(expected) for one in passes)
    assert (passes[0] == passes[1] == expected) == (not shuffle)


@pytest.mark.parametrize("index", [0, 1, 7, 30, COUNT - 1, COUNT, COUNT + 1, 2 * COUNT + 13])
def test_going_on_from_any_place_gives_the_same(settings, chatglm2, index: int) -> None:
    rows = stream(settings, chatglm2)
    expected = all_rows(rows)
    again = stream(settings, chatglm2)
    for number in range(index):
        again[number]
    place = json.loads(json.dumps(again.place_of(index)))
    resumed = stream(settings, chatglm2)
    resumed.seek(index, place_from(place))
    assert all_rows(resumed, index) == expected[index:]


def test_a_place_that_prefetching_has_passed_is_known(settings, chatglm2) -> None:
    rows = stream(settings, chatglm2)
    expected = all_rows(stream(settings, chatglm2))
    rows[25]
    place = rows.place_of(16)
    rows[26]
    assert rows.place_of(40)["drawn"] == 40, "asked ahead of the rows"
    assert [tuple(rows[number]["input_ids"]) for number in (27, 40)] == [expected[27], expected[40]]
    resumed = stream(settings, chatglm2)
    resumed.seek(16, place_from(place))
    assert tuple(resumed[16]["input_ids"]) == expected[16]
    assert tuple(rows[3]["input_ids"]) == expected[3], "gone back, as after a rollback"
    assert tuple(rows[4]["input_ids"]) == expected[4]


def test_conversations_of_several_rows_are_taken_up_in_their_middle(chatglm2, write) -> None:
    talks = [{"prompt": f"r{n}", "response": "b", "history": [[f"q{n}", "a"]] * (n % 3)} for n in range(9)]
    settings = DataSettings(
        train_file=write("talks.jsonl", "\n".join(map(json.dumps, talks))),
        max_source_length=200, max_target_length=10, loss_on="all_turns", streaming=True, shuffle_buffer=3,
    )  # fmt: skip
    expected = all_rows(stream(settings, chatglm2, num_rows=40))
    for index in range(20):
        rows = stream(settings, chatglm2, num_rows=40)
        place = rows.place_of(index)
        resumed = stream(settings, chatglm2, num_rows=40)
        resumed.seek(index, place_from(place))
        assert all_rows(resumed, index) == expected[index:]


def test_unusable_rows_end_the_run_or_are_left_out(settings, chatglm2, write) -> None:
    lines = ['{"prompt": "q", "response": "a"}'] * 4
    lines[1:1] = ["broken", '{"prompt": "q", "response": ""}']
    bad = replace(settings, train_file=write("bad.jsonl", "\n".join(lines)))
    with pytest.raises(DataError, match=r"bad\.jsonl.*line 2"):
        all_rows(stream(bad, chatglm2))
    skipping = replace(bad, on_bad_row="skip")
    rows = stream(skipping, chatglm2, num_rows=4)
    assert len(all_rows(rows)) == 4
    assert [row.line for row in rows.bad] == [2, 3]
    expected = all_rows(stream(skipping, chatglm2, num_rows=11))
    for index in range(11):
        one = stream(skipping, chatglm2, num_rows=11)
        resumed = stream(skipping, chatglm2, num_rows=11)
        resumed.seek(index, place_from(one.place_of(index)))
        assert all_rows(resumed, index) == expected[index:]
    nothing = replace(skipping, train_file=write("none.jsonl", '{"prompt": "q", "response": ""}\n' * 3))
    with pytest.raises(DataError, match=r"no row of it can be used"):
        stream(nothing, chatglm2)[0]


def test_the_split_says_what_is_known(settings, chatglm2) -> None:
    split = stream_split(replace(settings, system="be kind"), chatglm2, num_rows=120, seed=1, shuffle=True)
    assert (split.system, split.is_chat, len(split.lengths), len(split.rows)) == ("be kind", True, 120, 120)
    again = stream_split(settings, chatglm2, num_rows=7, seed=2, shuffle=True)
    assert again.fingerprint == split.fingerprint
    assert "120 rows; nothing cut" in split.unseen.line()
    assert split.stream.place_of(0) == {"number": 0, "drawn": 0, "rest": 0}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_source_length": None}, r"`data\.max_source_length` is null.*streaming.*Give a number"),
        ({"packing": True}, r"`data\.packing` is True.*streaming.*lengths of all"),
        ({"validation_frac": 0.1}, r"`data\.validation_frac` is 0\.1.*streaming.*validation_file"),
        ({"streaming": False}, r"`data\.shuffle_buffer` is 8.*`data\.streaming` is false"),
    ],
    ids=["lengths", "packing", "frac", "buffer"],
)
def test_what_needs_all_rows_is_refused(settings, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(settings, **given)


def test_commands_that_need_all_rows_refuse(settings, chatglm2) -> None:
    for call in (lambda: check_data(settings, chatglm2), lambda: load_split(settings, "train", chatglm2)):
        with pytest.raises(ConfigError, match=r"`data\.streaming` is true.*max_train_samples"):
            call()


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_what_one_would_learn(settings, chatglm2, num_processes: int) -> None:
    expected = all_rows(stream(settings, chatglm2, num_rows=96))
    order = EpochSampler(range(96), batch_size=4, group_by_length=False, seed=1, shuffle=False)
    found: dict[int, tuple[int, ...]] = {}
    for rank in range(num_processes):
        rows = stream(settings, chatglm2, num_rows=96)
        for batch in RankBatches(order, batch_size=4, rank=rank, num_processes=num_processes):
            found |= {number: tuple(rows[number]["input_ids"]) for number in batch}
        assert rows.place_of(96) == stream(settings, chatglm2, num_rows=96).place_of(96)
    assert [found[number] for number in range(96)] == expected


def test_rows_of_the_hub_are_fetched_as_they_are_asked_for(chatglm2, monkeypatch) -> None:
    fetched: list[int] = []
    asked: list[dict[str, Any]] = []

    def load_dataset(name: str, subset: str | None, **how: Any) -> Any:
        asked.append({"name": name, "subset": subset, **how})

        def rows() -> Any:
            for number in range(1000):
                fetched.append(number)
                yield {"prompt": f"q{number}", "response": f"a{number}"}

        return rows()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    settings = DataSettings(
        train_file="owner/name", streaming=True, shuffle_buffer=5, max_source_length=60, max_target_length=9
    )
    rows = stream(settings, chatglm2, num_rows=2000)
    first = [tuple(rows[number]["input_ids"]) for number in range(10)]
    assert len(set(first)) == 10
    assert max(fetched) < 60, "the layout is told by 20 rows, and the buffer holds 5"
    assert asked[0] == {"name": "owner/name", "subset": None, "split": "train", "streaming": True}
    resumed = stream(settings, chatglm2, num_rows=2000)
    resumed.seek(6, place_from(stream(settings, chatglm2, num_rows=2000).place_of(6)))
    assert [tuple(resumed[number]["input_ids"]) for number in range(6, 10)] == first[6:]


def test_drawing_depends_on_seed_and_number_alone() -> None:
    letters = list(shuffled("abcdefghijkl", 4, (1, 0)))
    numbers = list(shuffled(range(12), 4, (1, 0)))
    assert [ord(letter) - ord("a") for letter in letters] == numbers != list(range(12))
    assert numbers != list(shuffled(range(12), 4, (1, 1)))
    assert all(place >= number - 4 for place, number in enumerate(numbers)), (
        "no further ahead than the buffer"
    )
    assert Place() == place_from({"number": 0, "drawn": 0, "rest": 0})
