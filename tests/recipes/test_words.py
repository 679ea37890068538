"""Words of a command line: any character in a value, names of other tools, and files of settings."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmtune.cli import COMMANDS, main
from glmtune.errors import ConfigError
from recipes.words.aliases import ALIASES, EPOCHS, UNSUPPORTED, VALUES
from recipes.words.compose import Command, load_settings
from recipes.words.reading import read_words
from recipes.words.values import quoted, written

REPO = Path(__file__).resolve().parents[2]


def command(name: str) -> Command:
    return importlib.import_module(COMMANDS[name][0]).COMMAND


ALL = [command(name) for name in COMMANDS]


def values(line: str | list[str]) -> dict[str, Any]:
    """All settings that a command line means, by path."""
    name, *words = shlex.split(line) if isinstance(line, str) else line
    reading = read_words(words, command(name))
    loaded = load_settings(command(name), reading.overrides, reading.config_dir)
    found: dict[str, Any] = {}

    def collect(nested: dict[str, Any], path: str) -> None:
        for key, value in nested.items():
            collect(value, f"{path}{key}.") if isinstance(value, dict) else found.update({path + key: value})

    collect(dataclasses.asdict(loaded), "")
    return found


LITERAL = [
    "客服数据/训练集.jsonl", "train (1).json", "it's.json", "a,b.jsonl", "a=b", "é", "😀", r"C:\data\train.json",
    "C:\\d\\", r"\\server\share\x.json", " a ", "~", "~/x", "a#b", "a!b", "{a}", "{a}.json", "[1].json", "[a", "a]",
    "train(1).json", "glob(*)", "choice(a,b)", "2024", "007", "1e-3", "true", "nan", "a\nb", "a  b", "", "x&y;z|<>",
    'say "a"', "`x`", "a\\", "${", "${a b}", "$HOME", "100%", "a:b", "key: value", "?", "*", "数据，一。", "\ufeffa",
]  # fmt: skip


@pytest.mark.parametrize("value", LITERAL)
def test_a_text_is_what_was_typed(value: str) -> None:
    assert values(["score", f"predictions={value}"])["predictions"] == value


@pytest.mark.parametrize("spelling", ["output_dir={}", "--output_dir={}", "--output-dir {}"])
def test_however_the_setting_is_spelled(spelling: str) -> None:
    words = spelling.format("输出 (1),a=b").replace("dir 输", "dir\t输").split("\t")
    assert values(["train", *words])["output_dir"] == "输出 (1),a=b"


@pytest.mark.parametrize("one", [command_ for command_ in ALL], ids=lambda one: one.name)
def test_every_text_of_every_command(one: Command) -> None:
    """What Hydra reads of the override is the text, for all settings that are one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    texts = [
        path for path, kind in one.types.items() if kind is str or "str | None" in str(kind).split("list")[0]
    ]
    assert texts
    for path in texts:
        override = written(f"{path}=a,b (1)='é.json", one)
        read = OverridesParser.create().parse_override(override).value()
        assert getattr(read, "text", read) == "a,b (1)='é.json", path


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=12), st.text(alphabet="a\\'\"${}:,[]() \n", max_size=10)))
def test_quoted_texts_are_read_back(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    read = OverridesParser.create().parse_override(f"x={quoted(text)}").value()
    kept = OmegaConf.create({"x": getattr(read, "text", read)})
    if "${" not in text:
        assert OmegaConf.to_container(kept, resolve=True) == {"x": text}


def test_what_hydra_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "那里")
    assert values("train data.train_file=null")["data.train_file"] is None
    assert values(["train", "data.train_file='null'"])["data.train_file"] == "null"
    assert values(["train", 'data.train_file="a, b"'])["data.train_file"] == "a, b"
    assert (
        values(["train", "data.train_file=数据/${oc.env:PLACE}.json"])["data.train_file"] == "数据/那里.json"
    )
    assert values(["train", r"data.source_prefix=价格 \${5}"])["data.source_prefix"] == "价格 ${5}"
    assert values(["train", "+recipe=lora", "lora={rank:3}"])["lora.rank"] == 3
    with pytest.raises(ConfigError, match=r"`\$\{5\.\.\.\}` refers to no setting"):
        values(["train", "data.source_prefix=价格 ${5}"])


@pytest.mark.parametrize(
    ("given", "items"),
    [
        ("wandb", ["wandb"]),
        ("wandb,mlflow", ["wandb", "mlflow"]),
        ("[wandb,mlflow]", ["wandb", "mlflow"]),
        ("['wandb', mlflow]", ["wandb", "mlflow"]),
        ("none", []),
        ("[]", []),
    ],
)
def test_lists(given: str, items: list[str]) -> None:
    assert values(["train", f"trainer.report_to={given}"])["trainer.report_to"] == items


def test_lists_of_any_characters() -> None:
    def subjects(given: str) -> Any:
        return values(["eval", f"benchmark.subjects={given}"])["benchmark.subjects"]

    assert subjects("高等数学") == ["高等数学"]
    assert subjects("[高等数学,it's (1)]") == ["高等数学", "it's (1)"]
    assert subjects("['a,b',2024]") == ["a,b", "2024"]
    assert subjects("null") is None


def test_own_configs_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "配 置 (1),x='"
    (folder / "recipe").mkdir(parents=True)
    (folder / "recipe" / "我的.yaml").write_text("# @package _global_\ntrainer:\n  max_steps: 7\n", "utf-8")
    for word in ("+recipe=我的", "recipe=我的", "我的"):
        assert values(["train", "--config-dir", str(folder), word])["trainer.max_steps"] == 7


def test_a_setting_that_no_grammar_reads() -> None:
    with pytest.raises(ConfigError, match="`学习率` is no setting of `glmtune train`"):
        values("train 学习率=1")


MEANT = [
    ("--learning_rate 1e-3", {"trainer.learning_rate": 1e-3}),
    ("--learning_rate=1e-3", {"trainer.learning_rate": 1e-3}),
    ("--learning-rate 1e-3", {"trainer.learning_rate": 1e-3}),
    ("--trainer.learning_rate 1e-3", {"trainer.learning_rate": 1e-3}),
    ("--pre_seq_len 128 --quantization_bit 4", {"prefix.pre_seq_len": 128, "model.quantization_bit": 4}),
    ("--quantization int8", {"model.quantization": "int8"}),
    ("lr=1e-3", {"trainer.learning_rate": 1e-3}),
    ("epochs=3", {EPOCHS: 3, "trainer.max_steps": None}),
    ("num_train_epochs=3 max_steps=-1", {EPOCHS: 3, "trainer.max_steps": None}),
    ("batch_size=3", {"trainer.per_device_train_batch_size": 3}),
    ("model_name_or_path=THUDM/chatglm2-6b", {"model.source": "THUDM/chatglm2-6b"}),
    ("model_name_or_path=ChatGLM2-6B", {"model.source": "chatglm2-6b"}),
    ("model=THUDM/chatglm2-6b", {"model.source": "THUDM/chatglm2-6b"}),
    ("model=ChatGLM2-6B", {"model.source": "chatglm2-6b"}),
    ("model=我的/模型", {"model.source": "我的/模型"}),
    (r"model='C:\模型'", {"model.source": r"C:\模型"}),
    ("recipe=lora", {"tune": "lora"}),
    ("LoRA", {"tune": "lora"}),
    ("lora_rank=4 lora", {"lora.rank": 4}),
    ("data=my/file.jsonl", {"data.name": "files", "data.train_file": "my/file.jsonl"}),
    ("data='训练 (1).jsonl'", {"data.name": "files", "data.train_file": "训练 (1).jsonl"}),
    ("train_file=a.json", {"data.name": "files", "data.train_file": "a.json", "data.validation_file": None}),
    ("data=adgen train_file=a.json", {"data.name": "adgen", "data.train_file": "a.json"}),
    ("ptuning_chat train_file=a.json", {"data.max_source_length": 256, "data.train_file": "a.json"}),
    ("--report_to wandb mlflow", {"trainer.report_to": ["wandb", "mlflow"]}),
    ("--bf16", {"trainer.precision": "bf16"}),
    ("fp16=True", {"trainer.precision": "fp16"}),
    ("--fp16 false", {"trainer.precision": "auto"}),
    ("--do_train lora", {"tune": "lora"}),
    ("--gradient_checkpointing lora", {"trainer.gradient_checkpointing": True, "tune": "lora"}),
    ("full --deepspeed my/ds_z2.json", {"deepspeed.config_file": "my/ds_z2.json", "deepspeed.stage": 2}),
    ("--overwrite_output_dir", {"resume": "never"}),
    ("--resume_from_checkpoint", {"resume": "auto"}),
    ("--resume_from_checkpoint runs/检/checkpoint-3", {"resume": "runs/检/checkpoint-3"}),
    ("--eval_strategy steps --save_strategy=steps", {}),
    ("fsdp=full_shard", {"distributed": "fsdp"}),
    ("optim=adamw_hf", {"trainer.optim": "adamw_torch"}),
    ("push_to_hub=false --label_smoothing_factor 0", {}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "meant"), MEANT)
def test_what_was_meant(words: str, meant: dict[str, Any]) -> None:
    found = values(f"train {words}")
    assert {path: found[path] for path in meant} == meant


OFFICIAL = (
    "--{} --train_file AdvertiseGen/train.json --validation_file AdvertiseGen/dev.json"
    " --test_file AdvertiseGen/dev.json --preprocessing_num_workers 10 --prompt_column content"
    " --response_column summary --overwrite_cache --model_name_or_path THUDM/chatglm2-6b --output_dir output/x"
    " --overwrite_output_dir --max_source_length 64 --max_target_length 128 --per_device_eval_batch_size 1"
    " --predict_with_generate --pre_seq_len 128 --quantization_bit 4"
)
OFFICIAL_TRAIN = (
    " --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --max_steps 3000 --logging_steps 10"
    " --save_steps 1000 --learning_rate 2e-2"
)


def test_the_official_scripts_as_they_are() -> None:
    trained = values(f"train {OFFICIAL.format('do_train')}{OFFICIAL_TRAIN}")
    assert trained["tune"] == "prefix"
    assert trained["data.layout"] == "auto", "the columns named are those of a file of one's own"
    assert (trained["prefix.pre_seq_len"], trained["model.quantization_bit"]) == (128, 4)
    assert trained["trainer.learning_rate"] == 2e-2
    assert trained["output_dir"] == "output/x"
    predicted = values(
        f"predict {OFFICIAL.format('do_predict')} --ptuning_checkpoint output/x/checkpoint-3000"
    )
    assert predicted["prefix_path"] == "output/x/checkpoint-3000"
    assert (predicted["pre_seq_len"], predicted["generation.batch_size"]) == (128, 1)


def test_a_group_of_none() -> None:
    assert values("train full deepspeed=null")["tune"] == "full"
    assert "deepspeed.stage" not in values("train full deepspeed=zero3 deepspeed.stage=2 deepspeed=null")
    with pytest.raises(ConfigError, match="`data` is null, but `glmtune train` needs one"):
        values("train data=null")


def test_other_commands() -> None:
    assert values("predict data=my/q.jsonl")["data.test_file"] == "my/q.jsonl"
    assert values("predict data=my/q.jsonl split=train")["data.train_file"] == "my/q.jsonl"
    assert values("predict --num_beams 4")["generation.num_beams"] == 4
    assert values("eval CEval --num_fewshot 3")["benchmark.num_fewshot"] == 3
    assert values("export prefix_path=a output_dir=b --overwrite_output_dir")["overwrite"] is True
    assert values("info 我的/模型")["model.source"] == "我的/模型"
    assert values("data check data=rows.jsonl")["data.train_file"] == "rows.jsonl"
    assert values("compare candidates=int4,int8")["candidates"] == ["int4", "int8"]


def test_a_folder_without_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "模型").mkdir()
    assert values("train model=模型")["model.source"] == "模型"
    with pytest.raises(ConfigError, match=r"`模型` is no override: write `model=模型`"):
        values("train 模型")
    (tmp_path / "行.jsonl").touch()
    with pytest.raises(ConfigError, match=r"write `data=行.jsonl`"):
        values("train 行.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train trainer.bf16=true", "Did you mean `trainer.precision=bf16`"),
        ("train trainer.lr=1", "Did you mean `trainer.learning_rate`"),
        ("train prefix.learning_rate=1", "Did you mean `trainer.learning_rate`"),
        ("train trainer.learning_rat=1", "Did you mean `trainer.learning_rate`"),
        ("train --do_predict", "cannot be obeyed: write `glmtune predict prefix_path=RUN`"),
        ("predict --do_train", "cannot be obeyed: write `glmtune train`"),
        ("train --do_train false", "Leave it out"),
        ("train --num_beams 4", "`generation.num_beams=...` is a setting of `glmtune predict`"),
        ("train --evaluation_strategy epoch", "write `trainer.eval_steps=N`"),
        ("train max_length=512", "write `data.max_source_length=N data.max_target_length=N`"),
        ("train train_batch_size=16", "`trainer.gradient_accumulation_steps=B`"),
        ("train --push_to_hub", "an argument of transformers' trainer that glmtune does not have"),
        ("train --tf32 true", "`--tf32 true` cannot be obeyed"),
        ("train --lr", "`--lr` is given no value: write `lr=VALUE`"),
        ("train -lr 3", "`-lr` is no option here"),
        ("train model=nosuch", "A folder is one, too"),
        ("train data=nosuch", "A file of rows is one, too"),
        ("train epochs=3 max_steps=10", "Add `trainer.max_steps=null`"),
        ("predict epochs=3", "`epochs` is no setting of `glmtune predict`"),
        ("train trainer.max_steps=1,2", "`trainer.max_steps` is '1,2'"),
        ("train missing.yaml", "`missing.yaml` stands for settings, but it cannot be read"),
    ],
)
def test_refusals_name_the_words_to_write(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        values(line)
    assert message in str(caught.value)


def test_no_guess_by_the_section_alone() -> None:
    for key in ("trainer.bf", "trainer.zzz", "data.quux"):
        with pytest.raises(ConfigError) as caught:
            values(f"train {key}=1")
        assert "Did you mean" not in str(caught.value)


def test_what_became_of_words_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "lr=1e-3", "--do_train", "ptuning", "quantization_bit=4", "--cfg"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "glmtune: `lr=1e-3 ptuning` is read as `trainer.learning_rate=1e-3 +recipe=ptuning`.",
        "glmtune: No setting is needed for `--do_train` (`glmtune train` does that).",
    ]
    assert main(["train", "trainer.learning_rate=1e-3", "+recipe=ptuning", "--cfg"]) == 0
    assert capsys.readouterr().err == ""


# The table.


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.name)
def test_no_alias_hides_a_setting(one: Command) -> None:
    for path in one.types:
        assert (
            read_words([f"{path}=x"], one).overrides in ([f"{path}=x"], [f"+{path}=x"]) or path in one.groups
        )
        leaf = path.rpartition(".")[2]
        if leaf in ALIASES and "." in path and leaf != "config_file":  # which says where files of settings go
            targets = [to for to in ALIASES[leaf].to if to in one.types or to in one.groups]
            # `num_gpus` of training are processes: a run that tunes refuses to split one model.
            is_meant = not targets or leaf in targets[0] or leaf in ("limit", "fsdp", "num_gpus")
            assert is_meant, f"{leaf} of {path} is read as {targets}"


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_is_of_use(name: str) -> None:
    alias = ALIASES[name]
    places = {place for one in ALL for place in (*one.types, *one.groups)}
    assert set(alias.to) <= places
    words = [word for several in alias.values.values() for word in several.split()]
    assert {word.partition("=")[0] for word in words} <= places
    assert alias.to or alias.values or alias.needless or alias.refused
    for to in alias.to:
        one = next(one for one in ALL if to in (*one.types, *one.groups))
        first = next(path for path in alias.to if path in (*one.types, *one.groups))
        if name not in (*one.types, *one.groups) and "x" not in alias.values:
            became = [word.lstrip("+") for word in read_words([f"{name}=x"], one).overrides]
            assert f"{first}=x" in became or became == ["data=files", f"{first}=x"]


def test_values_of_other_tools_are_of_settings() -> None:
    paths = {path for one in ALL for path in one.types}
    assert set(VALUES) <= paths


def test_every_argument_of_transformers_is_known() -> None:
    """Meant, needless or refused with a reason: none ends in `no setting of glmtune train`."""
    from transformers import Seq2SeqTrainingArguments

    for field in dataclasses.fields(Seq2SeqTrainingArguments):
        if field.name == "run_name":
            continue
        one = command("train")
        known = field.name in (*ALIASES, *UNSUPPORTED, *one.types, *one.groups)
        assert known or any(path.endswith(f".{field.name}") for path in one.types), field.name


# Files of settings.


def test_a_file_of_flat_names(tmp_path: Path) -> None:
    file = tmp_path / "我的.yaml"
    file.write_text(
        "model_name_or_path: THUDM/chatglm2-6b\nrecipe: lora\ndo_train: true\ntrain_file: 我的/a,b.json\n"
        "prompt_column: 问题\nresponse_column: '2024'\nlearning_rate: 1e-3\nnum_train_epochs: 3\nmax_steps: -1\n"
        "fp16: true\nbf16: null\nreport_to: none\ndeepspeed: null\ntrainer:\n  save_steps: 20\nlora:\n  rank: 4\n",
        "utf-8",
    )
    found = values(["train", str(file)])
    assert found["model.source"] == "THUDM/chatglm2-6b"
    assert (found["tune"], found["lora.rank"]) == ("lora", 4)
    assert (found["data.train_file"], found["data.prompt_column"]) == ("我的/a,b.json", "问题")
    assert found["data.response_column"] == "2024"
    assert (found["trainer.learning_rate"], found["trainer.num_train_epochs"]) == (1e-3, 3)
    assert found["trainer.max_steps"] is None
    assert (found["trainer.precision"], found["trainer.report_to"]) == ("fp16", [])
    assert found["trainer.save_steps"] == 20
    later = values(["train", str(file), "lr=5", "--lora_rank", "2", "model=glm-tiny"])
    assert (later["trainer.learning_rate"], later["lora.rank"]) == (5, 2)
    assert later["model.source"] == "glm-tiny"


def test_a_file_like_a_run_writes(tmp_path: Path) -> None:
    import yaml

    before = load_settings(
        command("train"), ["+recipe=lora", "data=files", "data.train_file=it's, é", "deepspeed=zero3"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(before), allow_unicode=True), "utf-8")
    assert load_settings(command("train"), read_words([str(file)], command("train")).overrides) == before
    changed = values(["train", str(file), "seed=7", "deepspeed.stage=2"])
    assert (changed["seed"], changed["deepspeed.stage"]) == (7, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # `dial` was `sweep` once
        (["sweep", "strengths=[0,1]"], "`strengths` is no setting of `glmtune sweep`. It is a setting of `glmtune dial`."),
        (["sweep", "rouge=true"], "It is a setting of `glmtune dial`."),
        (["sweep", "prefix_path=runs/a"], "nothing to sweep. .* `glmtune dial prefix_path=RUN`"),
        (["predict", "benchmark=mmlu"], "It is a setting of `glmtune eval` or `glmtune compare`."),
        (["chat", "trainer.max_steps=3"], "of `glmtune quickstart`, `glmtune train`, `glmtune plan` or others. See"),
        (["chat", "draft.max_tokens=3"], "Did you mean `draft.num_tokens`?"),
        (["chat", "nothing_like_it=3"], "is no setting of `glmtune chat`. See"),
    ],
)  # fmt: skip
def test_settings_of_other_commands_and_old_names_say_where_to_go(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learning_rat: 3",
            "`learning_rat` is no setting of `glmtune train`. Did you mean `trainer.learning_rate`",
        ),
        ("trainer: {lr: 3}", "`trainer.lr` is no setting"),
        ("defaults: [data: files]", "`defaults` is of Hydra's own files"),
        ("- a\n- b", "does not hold names with values"),
        ("a: [", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        values(["train", str(file)])
    assert message in str(caught.value)
