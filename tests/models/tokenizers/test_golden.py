"""The tokenizers of ChatGLM-6B and GLM-4 on tiny files of our own, against independent encoders.

Where they differ from the released code on purpose:

- `text_ids`, and so every prompt of ours, recognises no special name (ChatGLM-6B's chat: `[MASK]`, `<sop>`, ...);
- decoding changes no blanks before punctuation unless `clean_up_tokenization_spaces` is set;
- a pair of texts is closed by GLM-4's end token (there: by a token that does not exist);
- ChatGLM-6B has an ordinary attention mask unless `prefix_lm_mask` is set.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorWithPadding

from glmtune.errors import CheckpointError, ConfigError
from glmtune.loading import load_tokenizer
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.chatglm import ChatGLMTokenizer
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizers"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
TEXTS = [item["text"] for item in EXPECTED["glm4"]["texts"]]


@pytest.fixture(params=["chatglm", "glm4"])
def tokenizer(request: pytest.FixtureRequest) -> VocabularyTokenizer:
    return load_tokenizer_folder(GOLDEN / request.param, Family(request.param))


@pytest.fixture
def first() -> VocabularyTokenizer:
    return load_tokenizer_folder(GOLDEN / "chatglm", Family.CHATGLM)


@pytest.fixture
def glm4() -> VocabularyTokenizer:
    return load_tokenizer_folder(GOLDEN / "glm4", Family.GLM4)


def test_encodings(tokenizer: VocabularyTokenizer) -> None:
    expected = EXPECTED[tokenizer.family]
    assert tokenizer.vocab_size == expected["vocab_size"]
    assert expected["texts"]
    for item in expected["texts"]:
        assert tokenizer.text_ids(item["text"]) == item["ids"]
        assert tokenizer.encode(item["text"]) == [*tokenizer.prefix_ids, *item["ids"], *tokenizer.suffix_ids]
        assert tokenizer.decode(item["ids"]) == item["text"]
        assert tokenizer.decode(tokenizer.encode(item["text"]), skip_special_tokens=True) == item["text"]


def test_command_pieces_are_added_to_files_of_march_2023(first: VocabularyTokenizer) -> None:
    assert EXPECTED["chatglm"]["commands"]
    for name, index in EXPECTED["chatglm"]["commands"].items():
        assert first.get_command(name) == index
    assert first.suffix_ids == [first.get_command("[gMASK]"), first.bos_token_id]
    assert first.end_id == first.eos_token_id == first.get_command("<eop>")


def test_files_of_march_2023_equal_later_ones(oracles: Path, tmp_path: Path) -> None:
    """The tiny oracle file without its command pieces is what March 2023 had; reading it gives the same ids."""
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = proto.ModelProto()
    model.ParseFromString((oracles / "tokenizers" / "tiny_v1" / "ice_text.model").read_bytes())
    first_command = next(place for place, item in enumerate(model.pieces) if item.piece == "[MASK]")
    del model.pieces[first_command:]
    model.trainer_spec.byte_fallback = False
    (tmp_path / "ice_text.model").write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer_folder(tmp_path, Family.CHATGLM)
    expected = json.loads((oracles / "tokenizers" / "tiny_v1.json").read_text(encoding="utf-8"))
    assert expected["strings"]
    for item in expected["strings"]:
        assert tokenizer.encode(item["text"]) == item["ids_with_special"]
        assert tokenizer.decode(item["ids"]) == item["decoded"]


def test_image_tokens_stand_in_front(tmp_path: Path, first: VocabularyTokenizer) -> None:
    shutil.copytree(GOLDEN / "chatglm", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": 100}))
    shifted = load_tokenizer_folder(tmp_path, Family.CHATGLM)
    for text in [*TEXTS, "a [MASK] b"]:
        assert shifted.encode(text) == [index + 100 for index in first.encode(text)]
        assert shifted.decode([7, *shifted.encode(text)]) == first.decode(first.encode(text))
    assert shifted.pad_token_id == 103
    assert len(shifted) == len(shifted.get_vocab()) == len(first) + 100
    assert shifted.convert_ids_to_tokens([0, 99, 100]) == ["<image_0>", "<image_99>", "<unk>"]
    assert shifted.convert_tokens_to_ids(["<image_5>", "<image_100>"]) == [5, 100]
    shifted.save_pretrained(tmp_path / "saved")
    assert load_tokenizer_folder(tmp_path / "saved", Family.CHATGLM).encode("hi") == shifted.encode("hi")


def test_image_tokens_are_read_off_the_models_config(tmp_path: Path, first: VocabularyTokenizer) -> None:
    """In March 2023 no file said how many there are, but config.json knew the id of `<sop>`."""
    shutil.copytree(GOLDEN / "chatglm", tmp_path, dirs_exist_ok=True)
    config = {"model_type": "chatglm", "position_encoding_2d": True, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps({**config, "bos_token_id": first.bos_token_id + 200}))
    assert load_tokenizer(tmp_path).num_image_tokens == 200
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": 0}))
    assert load_tokenizer(tmp_path).num_image_tokens == 0
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "bos_token_id": 5}))
    with pytest.raises(
        CheckpointError, match=r"`bos_token_id` = 5, but `<sop>` is number \d+.*different releases"
    ):
        load_tokenizer(tmp_path)


def test_folders_without_a_model_are_told_by_their_files(tmp_path: Path) -> None:
    assert load_tokenizer(GOLDEN / "chatglm").family == Family.CHATGLM
    shutil.copytree(GOLDEN / "glm4", tmp_path / "new")
    with pytest.raises(
        CheckpointError, match=r"no config.json, and neither a name nor.*Pass `family=`, one of .*glm4"
    ):
        load_tokenizer(tmp_path / "new")
    (tmp_path / "new" / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLM4Tokenizer"}')
    assert load_tokenizer(tmp_path / "new").family == Family.GLM4
    assert load_tokenizer(shutil.copytree(GOLDEN / "glm4", tmp_path / "glm-4-9b")).family == Family.GLM4


def test_special_names_are_no_special_tokens_in_prompts(tokenizer: VocabularyTokenizer) -> None:
    name = "<sop>"
    command = tokenizer.get_command(name)
    assert tokenizer.encode(f"a {name} b", add_special_tokens=False).count(command) == 1
    assert command not in tokenizer.text_ids(f"a {name} b")
    assert tokenizer.encode(
        f"a {name} b", add_special_tokens=False, split_special_tokens=True
    ) == tokenizer.text_ids(f"a {name} b")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": name}], add_generation_prompt=True)
    assert chat["input_ids"].count(command) == 1


def test_names_in_texts_of_chatglm(first: VocabularyTokenizer) -> None:
    mask = first.get_command("[MASK]")
    assert first.encode("a [MASK]\n b", add_special_tokens=False) == [
        *first.text_ids("a"),
        mask,
        *first.text_ids("b"),
    ]
    assert first.encode("[MASK][MASK]", add_special_tokens=False) == [mask, mask]
    assert first.get_command("[gMASK]") not in first.encode("a [gMASK] b", add_special_tokens=False)


def test_settings_of_chatglm_are_obeyed_or_refused(tmp_path: Path, first: VocabularyTokenizer) -> None:
    file = str(GOLDEN / "chatglm" / "ice_text.model")
    tokenizer = ChatGLMTokenizer(file, do_lower_case=True, remove_space=True)
    assert tokenizer.text_ids("  How \n MANY ") == first.text_ids("how many")
    with pytest.raises(
        CheckpointError, match=r"`gmask_token` is '<g>', but ChatGLM-6B knows it as '\[gMASK\]'"
    ):
        ChatGLMTokenizer(file, gmask_token="<g>")
    with pytest.raises(KeyError, match="<nothing>"):
        first.get_command("<nothing>")


def test_padding(tokenizer: VocabularyTokenizer) -> None:
    texts = ["hi", "How many apples are left?"]
    left = tokenizer(texts, padding=True, return_tensors="pt")
    num, length = int(left["attention_mask"][0].sum()), left["input_ids"].shape[1]
    assert left["attention_mask"].shape == left["input_ids"].shape
    assert left["attention_mask"][0].tolist() == [0] * (length - num) + [1] * num
    assert left["input_ids"][0, : length - num].tolist() == [tokenizer.pad_token_id] * (length - num)
    right = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    assert right["input_ids"][0, :num].tolist() == left["input_ids"][0, length - num :].tolist()
    rows = [{"input_ids": tokenizer.encode(text)} for text in texts]
    assert torch.equal(DataCollatorWithPadding(tokenizer)(rows)["input_ids"], left["input_ids"])
    cut = tokenizer(texts[1], truncation=True, max_length=6)["input_ids"]
    assert cut == [*tokenizer.prefix_ids, *tokenizer.text_ids(texts[1])[:4], *tokenizer.suffix_ids]


def test_masks_of_the_release_need_left_padding(first: VocabularyTokenizer) -> None:
    first.prefix_lm_mask = True
    batch = first(["你", "你好 hi"], padding=True, return_tensors="pt")
    length = batch["input_ids"].shape[1]
    assert batch["attention_mask"].shape == (2, 1, length, length)
    assert batch["position_ids"].shape == (2, 2, length)
    with pytest.raises(ConfigError, match=r"`prefix_lm_mask` is set and `padding_side` is `right`.*left"):
        first(["a"], padding=True, padding_side="right")
    no_start = first.pad({"input_ids": [9, 10]}, padding="max_length", max_length=3)
    assert no_start["attention_mask"][0].tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    assert no_start["position_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]


def test_special_tokens_mask(tokenizer: VocabularyTokenizer) -> None:
    encoded = tokenizer("hi", return_special_tokens_mask=True)
    names = {*tokenizer.prefix_ids, *tokenizer.suffix_ids}
    assert encoded["special_tokens_mask"] == [int(index in names) for index in encoded["input_ids"]]
    assert tokenizer.get_special_tokens_mask([9], [10]) == [
        int(index in {*names, tokenizer.end_id})
        for index in tokenizer.build_inputs_with_special_tokens([9], [10])
    ]


def test_added_tokens_survive_saving_pickling_and_copying(
    tokenizer: VocabularyTokenizer, tmp_path: Path
) -> None:
    assert tokenizer.add_tokens(["<city>", "<sop>"]) == 1
    index = len(tokenizer) - 1
    assert tokenizer.text_ids("a<city>") == [*tokenizer.text_ids("a"), index]
    expected = tokenizer(["a<city>b", "hi"], padding=True)["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer_folder(tmp_path, tokenizer.family)
    for twin in (again, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert twin(["a<city>b", "hi"], padding=True)["input_ids"] == expected
        assert twin.convert_ids_to_tokens(index) == "<city>"
        assert len(twin) == index + 1
    assert load_tokenizer(tmp_path).family == tokenizer.family


def test_pieces_of_glm4_may_be_parts_of_characters(glm4: VocabularyTokenizer) -> None:
    pieces = glm4.tokenize("😀<|user|>")
    assert b"".join(pieces[:-1]) == "😀".encode()
    assert pieces[-1] == "<|user|>"
    assert glm4.convert_tokens_to_string(pieces) == "😀<|user|>"
    ids = glm4.convert_tokens_to_ids(pieces)
    assert glm4.decode(ids) == "😀 <|user|>"
    assert glm4.decode(ids, spaces_between_special_tokens=False) == "😀<|user|>"
    assert glm4.decode(ids[:1]) == "\ufffd"
    assert glm4.decode([len(glm4) + 5, *ids[:4]]) == "😀"


def test_broken_rank_files_are_named(tmp_path: Path) -> None:
    good = (GOLDEN / "glm4" / "tokenizer.model").read_bytes()
    for content, error in (
        (good + b"!!! 336\n", r"tokenizer.model, line 337: .*no piece in base64 with its rank"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n".join(good.split(b"\n")[1:]), r"holds 335 pieces, but their ranks do not count from 0 to 334"),
        (b"", "holds 0 pieces"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(CheckpointError, match=error):
            load_tokenizer_folder(tmp_path, Family.GLM4)


def test_a_config_of_another_rank_file_is_refused(tmp_path: Path, glm4: VocabularyTokenizer) -> None:
    glm4.save_pretrained(tmp_path)
    lines = (tmp_path / "tokenizer.model").read_bytes().splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(
        CheckpointError, match=r"'<\|endoftext\|>' the id 336, but special tokens follow the 335 ranks"
    ):
        load_tokenizer_folder(tmp_path, Family.GLM4)


@pytest.mark.parametrize(
    ("family", "file"), [(Family.CHATGLM, "ice_text.model"), (Family.GLM4, "tokenizer.model")]
)
def test_missing_files_are_named(tmp_path: Path, family: Family, file: str) -> None:
    with pytest.raises(CheckpointError, match=f"holds no `{file}`, which the tokenizer of `{family}` needs"):
        load_tokenizer_folder(tmp_path, family)
