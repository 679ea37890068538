"""Several values of a setting are what Hydra's own sweeper makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from glmtune.cli import main
from glmtune.errors import ConfigError
from glmtune.sweep.space import Choices, Interval, grid
from recipes.flows.sweep import COMMAND
from recipes.train import COMMAND as TRAIN
from recipes.words.compose import load_settings, take_apart, words_over
from recipes.words.reading import read_words
from recipes.words.several import first_of_each

RATE = "trainer.learning_rate"


def by_hydra(words: list[str]) -> list[list[tuple[str, object]]]:
    """Every point of Hydra's sweeper, values as Hydra reads them."""
    parser = OverridesParser.create()
    points = BasicSweeper.split_arguments(parser.parse_overrides(words), None)[0]
    return [read(point) for point in points]


def read(words: list[str]) -> list[tuple[str, object]]:
    found = OverridesParser.create().parse_overrides(words)
    return sorted((override.get_key_element(), override.value()) for override in found)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([f"{RATE}=1e-3,2e-2", "prefix.pre_seq_len=32,128"], id="commas"),
        pytest.param(["+recipe=ptuning,lora", "seed=3"], id="groups"),
        pytest.param(["a=range(1,4)", "b=range(0,1,0.25)", "c=range(3)"], id="ranges"),
        pytest.param(["a=choice(x,'y z')", "b=true,false", "c=null,1"], id="choices"),
        pytest.param(["a=[1,2],[3]", "b={x:1},{x:2}"], id="lists"),
        pytest.param(["a=sort(3,1,2)", "b=sort(range(1,4),reverse=true)"], id="sorted"),
        pytest.param(["a='1,2','[x]','null'", "b=x y,z"], id="quoted"),
        pytest.param(["a=./x/y.jsonl,b.jsonl", "b=-1,1e5,.5"], id="paths and numbers"),
        pytest.param(["a=1,2", "b=4,5", "a=3,4"], id="twice"),
    ],
)
def test_points_are_those_of_hydra(words: list[str]) -> None:
    fixed, axes = take_apart(words, COMMAND)
    mine = [read([*fixed, *point.words]) for point in grid(axes)]
    assert mine == by_hydra(words)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("a=interval(1e-4,1e-1)", Interval("a", 1e-4, 0.1)),
        ("a=interval(1,8)", Interval("a", 1.0, 8.0)),
        ("a=tag(log, interval(1e-4, 1e-1))", Interval("a", 1e-4, 0.1, is_log=True)),
        ("a=int(interval(4,64))", Interval("a", 4, 64, is_int=True)),
        ("a=tag(log,int(interval(4,64)))", Interval("a", 4, 64, is_int=True, is_log=True)),
        ("data=glob(a*)", Choices("data", ("adgen", "ads"))),
        ("data=glob(*,exclude=[c*,f*,p*])", Choices("data", ("adgen", "ads"))),
        ("data.train_file=训练集.jsonl,b.jsonl", Choices("data.train_file", ("'训练集.jsonl'", "b.jsonl"))),
    ],
)
def test_what_is_no_list(word: str, expected: object) -> None:
    assert take_apart([word], COMMAND) == ([], [expected])


@pytest.mark.parametrize(
    "word", ["a=1", "a='1,2'", "a=[1,2]", "data.train_file=训练集.jsonl", "~a", "a={x:[1,2]}", "a="]
)
def test_one_value_stays_as_it_is(word: str) -> None:
    assert take_apart([word], COMMAND) == ([word], [])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a=1,2,1", r"`a` is to take 1 more than once.*sweep.repeats=3"),
        ("a=range(3,3)", r"`a` is given no value: a range"),
        ("a=interval(2,1)", r"from 2 to 1, but its ends must be apart"),
        ("a=tag(log,interval(0,1))", r"from 0 to 1, but its lower end must be above 0"),
        ("a=tag(odd,interval(0,1))", r"has the tag `odd`"),
        ("data=glob(q*)", r"`data=glob\(q\*\)` matches none of adgen"),
        ("trainer.optim=glob(*)", r"but `trainer.optim` is no group"),
    ],
)
def test_what_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take_apart([word], COMMAND)


def test_the_first_of_each_stands_for_all() -> None:
    words = [f"{RATE}=2e-3,1e-3", "trainer.weight_decay=tag(log,interval(1e-4,1e-1))", "seed=3"]
    assert first_of_each(words, COMMAND) == [f"{RATE}=0.002", "trainer.weight_decay=0.0001", "seed=3"]
    settings = load_settings(COMMAND, ["+recipe=ptuning", *words])
    assert (settings.trainer.learning_rate, settings.trainer.weight_decay, settings.seed) == (
        0.002,
        0.0001,
        3,
    )


def test_settings_of_a_file_are_the_same_as_those_typed(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(
        "recipe: ptuning\nsweep:\n  repeats: 3\n  over:\n    trainer.learning_rate: [0.001, 0.02]\n"
        "    prefix: {pre_seq_len: [16, 32]}\n    data.source_prefix: ['写：, 好', plain]\n"
        "    trainer.weight_decay: interval(0, 0.1)\n"
    )
    overrides = read_words([str(file), "seed=7"], COMMAND).overrides
    settings = load_settings(COMMAND, overrides)
    assert (settings.sweep.repeats, settings.seed, settings.tune) == (3, 7, "prefix")
    words = words_over(settings.sweep.over)
    axes = take_apart(words, COMMAND)[1]
    assert axes == [
        Choices(RATE, ("0.001", "0.02")),
        Choices("prefix.pre_seq_len", ("16", "32")),
        Choices("data.source_prefix", ("'写：, 好'", "plain")),
        Interval("trainer.weight_decay", 0.0, 0.1),
    ]
    point = grid(axes[:3])[0]
    assert load_settings(TRAIN, ["+recipe=ptuning", *point.words]).data.source_prefix == "写：, 好"


@pytest.mark.parametrize("values", [3, [], None, True])
def test_values_that_are_no_list(values: object) -> None:
    with pytest.raises(ConfigError, match=r"`sweep.over` has .* for `seed`, but it takes a list"):
        words_over({"seed": values})


@pytest.mark.parametrize("word", ["-m", "--multirun"])
def test_the_word_of_hydra(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    reading = read_words([word, f"{RATE}=1,2"], COMMAND)
    assert reading.overrides == [f"{RATE}=1,2"]
    assert reading.notes == [f"No setting is needed for `{word}` (a sweep is several runs)."]
    assert main(["train", word, "+recipe=ptuning", f"{RATE}=1e-3,2e-3"]) == 2
    assert "is of `glmtune sweep`" in capsys.readouterr().err
