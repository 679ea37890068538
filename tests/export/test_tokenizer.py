"""The tokenizer of an export in transformers' format: nothing of the source's is lost, or no export appears."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from glmtune.errors import CheckpointError, DataError
from glmtune.export import tokenizer as writing
from glmtune.export.export import export
from glmtune.export.source import ExportJob
from glmtune.export.tokenizer import write_tokenizer
from glmtune.export.tokenizer_probes import CALL, TOOL, control_words
from glmtune.models.releases.families import Family
from glmtune.models.templates.jinja_forms import HIDDEN, jinja_form
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.models.tokenizers.tokenizer_json import JsonTokenizer
from tests.models.transformers_folders import make_folder

RANKS = Path(__file__).resolve().parent.parent / "golden" / "tokenizers" / "glm4" / "tokenizer.model"
CHAT_FAMILIES = [Family.CHATGLM2, Family.CHATGLM3, Family.GLM4]
NEW = ["<nick>", "词元"]
NEW_SPECIAL = "<|call|>"


@pytest.fixture(params=CHAT_FAMILIES, ids=str)
def ours(request: pytest.FixtureRequest, tiny_tokenizer_folder: Path, tmp_path: Path) -> Any:
    """The tokenizer of a release, with tokens that a user added."""
    return with_tokens(request.param, tiny_tokenizer_folder, tmp_path / "source")


def with_tokens_of(family: Family, vocabulary: Path, folder: Path) -> Any:
    folder.mkdir()
    shutil.copy(vocabulary / "tokenizer.model", folder)
    return with_added(load_tokenizer_folder(folder, family))


def with_tokens(family: Family, tiny: Path, folder: Path) -> Any:
    if family is Family.GLM4:
        folder.mkdir()
        shutil.copy(RANKS, folder)
    else:
        shutil.copytree(tiny, folder)
        (folder / "tokenizer_config.json").unlink()
    return with_added(load_tokenizer_folder(folder, family))


def with_added(tokenizer: Any) -> Any:
    assert tokenizer.add_tokens(NEW) == 2
    assert tokenizer.add_tokens([NEW_SPECIAL], special_tokens=True) == 1
    return tokenizer


def written(tokenizer: Any, folder: Path) -> Any:
    folder.mkdir()
    write_tokenizer(tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


def prompt(tokenizer: Any, text: str) -> list[int]:
    found = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    return list(found["input_ids"])


def test_tokens_that_users_added_keep_their_ids(ours: Any, tmp_path: Path) -> None:
    theirs = written(ours, tmp_path / "out")
    text = f"x{NEW_SPECIAL}{NEW[1]} {NEW[0]}y{NEW[0]}"
    ids = [ours.convert_tokens_to_ids(name) for name in (*NEW, NEW_SPECIAL)]
    assert [theirs.convert_tokens_to_ids(name) for name in (*NEW, NEW_SPECIAL)] == ids
    assert theirs(text)["input_ids"] == [*ours.prefix_ids, *ours.text_ids(text)]
    assert set(ids) <= set(theirs(text)["input_ids"])
    assert prompt(theirs, NEW[0] + "?") == prompt(ours, NEW[0] + "?")
    only_plain = theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
    assert NEW[0] in only_plain
    assert NEW_SPECIAL not in only_plain, "a special one is skipped, as it was"


def test_our_own_loader_finds_them_too_and_nothing_else(ours: Any, tmp_path: Path) -> None:
    written(ours, tmp_path / "out")
    again = load_tokenizer_folder(tmp_path / "out", ours.family)
    assert isinstance(again, JsonTokenizer)
    assert len(again) == len(ours)
    text = f"{control_words(ours)} x{NEW_SPECIAL}{NEW[1]} {NEW[0]}y"
    assert again.text_ids(text) == ours.text_ids(text)
    assert prompt(again, text) == prompt(ours, text)
    assert again.add_tokens(["<later>"]) == 1
    theirs = written(again, tmp_path / "once more")
    assert theirs.convert_tokens_to_ids("<later>") == len(ours) == again.convert_tokens_to_ids("<later>")
    third = load_tokenizer_folder(tmp_path / "once more", ours.family)
    assert third.text_ids(f"{text}<later>") == again.text_ids(f"{text}<later>")


def test_control_words_of_a_user_are_text(ours: Any, tmp_path: Path) -> None:
    theirs = written(ours, tmp_path / "out")
    words = control_words(ours)
    found = prompt(theirs, words)
    assert found == prompt(ours, words)
    forbidden = {ours.get_command(name) for name in ours.command_names} | {ours.end_id}
    written_by_the_template = set(prompt(ours, "x"))
    assert not set(found) & (forbidden - written_by_the_template)
    assert found.count(ours.prefix_ids[0]) == 1
    assert theirs(words, split_special_tokens=True)["input_ids"][2:] == ours.text_ids(words)
    assert HIDDEN not in theirs.decode(found)
    # A mark that a user writes is dropped, and makes no name of a token.
    assert prompt(theirs, f"<|us{HIDDEN}er|>") == prompt(ours, "<|user|>")


def test_html_in_plain_text_loses_only_the_named_end(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    """transformers looks for `eos_token` and `pad_token` in every text; for nothing else of the release."""
    ours = with_tokens(Family.CHATGLM3, tiny_tokenizer_folder, tmp_path / "source")
    theirs = written(ours, tmp_path / "out")
    for text in ("a <s>b", "[MASK] or [sMASK]", "sop eop <eop>"):
        assert theirs(text)["input_ids"] == [*ours.prefix_ids, *ours.text_ids(text)]
    assert theirs("a</s>")["input_ids"][-1] == ours.end_id
    assert ours.text_ids("a</s>")[-1] != ours.end_id


@pytest.mark.parametrize("family", [Family.CHATGLM3, Family.GLM4])
@pytest.mark.parametrize(
    ("chat", "tools"),
    [
        ([{"role": "user", "content": "x"}], [TOOL]),
        ([{"role": "system", "content": "x"}, {"role": "user", "content": "x", "tools": [TOOL]}], None),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], None),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], None),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], None),
        ([{"role": "judge", "content": "x"}], None),
        ([{"role": "user", "content": "x", "metadata": "a\nb"}], None),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, {"role": "user"}], None),
    ],
)
def test_what_ours_refuses_the_jinja_form_refuses(
    family: Family, chat: list, tools: Any, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    ours = with_tokens(family, tiny_tokenizer_folder, tmp_path / "source")
    theirs = written(ours, tmp_path / "out")
    with pytest.raises(DataError):
        ours.apply_chat_template(chat, tools=tools, add_generation_prompt=True)
    with pytest.raises(TemplateError):
        theirs.apply_chat_template(chat, tools=tools, add_generation_prompt=True)


@pytest.mark.parametrize(
    "chat",
    [
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
        [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}],
        [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}],
        [{"role": "user", "content": "x", "metadata": "y"}],
        [{"role": "system", "content": "x", "tools": [TOOL]}, {"role": "user", "content": "x"}],
    ],
)
def test_rounds_refuse_what_ours_refuse(chat: list, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    ours = with_tokens(Family.CHATGLM2, tiny_tokenizer_folder, tmp_path / "source")
    theirs = written(ours, tmp_path / "out")
    for tokenizer, error in ((ours, DataError), (theirs, TemplateError)):
        with pytest.raises(error):
            tokenizer.apply_chat_template(chat, add_generation_prompt=True)


def test_arguments_as_json_text_are_refused_by_jinja_alone(
    tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Jinja cannot parse JSON; to write the text as it is would give other ids than ours."""
    ours = with_tokens(Family.GLM4, tiny_tokenizer_folder, tmp_path / "source")
    theirs = written(ours, tmp_path / "out")
    call = {"function": {"name": "f", "arguments": '{"a":1}'}}
    chat = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}]
    assert ours.apply_chat_template(chat, add_generation_prompt=True)
    with pytest.raises(TemplateError, match="must be an object, not its JSON"):
        theirs.apply_chat_template(chat, add_generation_prompt=True)
    call["function"] = {"name": "f", "arguments": {"a": 1}}
    assert prompt_of(theirs, chat) == prompt_of(ours, chat)


def prompt_of(tokenizer: Any, chat: list) -> list[int]:
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])


# ---- what must not appear


@pytest.mark.parametrize("lost", ["names", "added", "tools", "empty"])
def test_a_template_that_loses_something_is_no_export(
    lost: str, tiny_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = with_tokens(Family.CHATGLM3, tiny_tokenizer_folder, tmp_path / "source")

    def worse(family: Family, *, names: Any = (), added: Any = ()) -> str:
        form = jinja_form(
            family, names=() if lost == "names" else names, added=() if lost == "added" else added
        )
        assert form is not None
        changes = {"tools": ("if announced", "if false"), "empty": ("if content and", "if true or")}
        old, new = changes.get(lost, ("x", "x"))
        assert old in form
        return form.replace(old, new)

    monkeypatch.setattr(writing, "jinja_form", worse)
    with pytest.raises(CheckpointError, match="as transformers reads it gives"):
        written(ours, tmp_path / "out")


def test_added_tokens_that_are_lost_are_noticed(
    tiny_tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = with_tokens(Family.CHATGLM2, tiny_tokenizer_folder, tmp_path / "source")
    monkeypatch.setattr(writing, "_added_tokens", lambda tokenizer: [])
    with pytest.raises(CheckpointError, match=r"as transformers reads it gives .* for 'x<nick> y"):
        written(ours, tmp_path / "out")


def test_ends_of_answers_are_compared(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    ours = with_tokens(Family.CHATGLM3, tiny_tokenizer_folder, tmp_path / "source")
    (tmp_path / "out").mkdir()
    GenerationConfig(eos_token_id=2, pad_token_id=0).save_pretrained(tmp_path / "out")
    ends = [ours.get_command("<|user|>"), ours.get_command("<|observation|>")]
    with pytest.raises(CheckpointError, match=rf"names \[2\] as ends.*\[{ends[0]}, {ends[1]}\]"):
        write_tokenizer(ours, tmp_path / "out")
    GenerationConfig(eos_token_id=[2, *ends], pad_token_id=0).save_pretrained(tmp_path / "out")
    write_tokenizer(ours, tmp_path / "out")


def test_chatglm_6b_has_no_such_form(tmp_path: Path) -> None:
    folder = RANKS.parents[1] / "chatglm"
    with pytest.raises(CheckpointError, match=r"`chatglm` has no form.*format=official"):
        write_tokenizer(load_tokenizer_folder(folder, Family.CHATGLM), tmp_path)


# ---- folders that are in the format already


def test_a_folder_in_the_format_keeps_its_file(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", "glm4")
    ours: Any = load_tokenizer_folder(source, Family.TRANSFORMERS)
    assert ours.add_tokens(["<later>"]) == 1
    theirs = written(ours, tmp_path / "out")
    before, after = ((folder / "tokenizer.json").read_bytes() for folder in (source, tmp_path / "out"))
    assert before == after
    assert theirs.convert_tokens_to_ids("<later>") == ours.convert_tokens_to_ids("<later>")
    again = load_tokenizer_folder(tmp_path / "out", Family.TRANSFORMERS)
    assert again.text_ids("a<later>b") == ours.text_ids("a<later>b")


@pytest.mark.parametrize("value", ["<nick>", [1]])
def test_names_that_are_none(value: object, ours: Any, tmp_path: Path) -> None:
    written(ours, tmp_path / "out")
    file = tmp_path / "out" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"glmtune_added_tokens": value}))
    with pytest.raises(CheckpointError, match="must be a list of names"):
        load_tokenizer_folder(tmp_path / "out", ours.family)


# ---- rows of the embedding


def test_added_tokens_need_rows(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chatglm2-tiny"
    shutil.copytree(tiny_base, folder)
    rows = json.loads((folder / "config.json").read_text())["padded_vocab_size"]
    tokenizer: Any = load_tokenizer_folder(folder, Family.CHATGLM2)
    tokenizer.add_tokens([f"<{number}>" for number in range(rows - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer_folder(folder, Family.CHATGLM2)) == rows
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        CheckpointError,
        match=rf"makes {rows + 1} ids.*has {rows} rows.*<one more>.*resize_token_embeddings\({rows + 1}\)",
    ):
        load_tokenizer_folder(folder, Family.CHATGLM2)


@pytest.mark.parametrize("family", [Family.CHATGLM2_32K, Family.CHATGLM3_32K, Family.CODEGEEX2])
def test_the_other_families(family: Family, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    theirs = written(with_tokens(family, tiny_tokenizer_folder, tmp_path / "source"), tmp_path / "out")
    assert (theirs.chat_template is None) == (family is Family.CODEGEEX2)


@pytest.mark.parametrize("family", [Family.CHATGLM2, Family.CHATGLM3])
def test_the_released_vocabulary(family: Family, released_tokenizers: Path, tmp_path: Path) -> None:
    ours = with_tokens_of(family, released_tokenizers / "chatglm2-6b", tmp_path / "source")
    theirs = written(ours, tmp_path / "out")
    assert len(theirs) == len(ours)


def test_plain_transformers_is_what_reads_it(ours: Any, tmp_path: Path) -> None:
    assert isinstance(written(ours, tmp_path / "out"), PreTrainedTokenizerFast)
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in config


@pytest.mark.parametrize("form", ["transformers", "official"])
def test_the_name_of_the_release_is_kept(form: str, tiny_base: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_base, source)
    config = json.loads((source / "config.json").read_text())
    for name in ("THUDM/chatglm2-6b", None):
        config["_name_or_path"] = name
        (source / "config.json").write_text(json.dumps(config))
        folder = tmp_path / f"out {name is None}"
        export(ExportJob(str(source), form, folder, None, None, None, None, 2**30, False))
        assert json.loads((folder / "config.json").read_text()).get("_name_or_path") == name


def test_a_gguf_file_of_an_export_has_the_tokens_of_one_of_the_source(ours: Any, tmp_path: Path) -> None:
    """The steps that drop the template's marks are none of llama.cpp's; its template has no marks."""
    from glmtune.export.gguf.vocabulary import vocabulary_of

    written(ours, tmp_path / "out")
    again = load_tokenizer_folder(tmp_path / "out", ours.family)
    first, second = (vocabulary_of(tokenizer, len(ours)) for tokenizer in (ours, again))
    assert (second.model, second.pattern, second.tokens) == (first.model, first.pattern, first.tokens)
    assert second.special_ids == first.special_ids
    assert second.chat_template == first.chat_template
    assert HIDDEN not in str(second.chat_template)
