"""What the tokenizers do as transformers tokenizers, on a tiny file trained from our own sentences.

Where they differ from the released code on purpose:

- padding on the right works (there: refused), with position ids 0 on padding;
- ids beyond the vocabulary, which the padded embedding of a model allows, decode to nothing (there: a crash);
- ``get_vocab`` names the command tokens (there: one empty name for all of ChatGLM2's);
- half a surrogate pair in a text is encoded as U+FFFD (there: a crash).
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, GlmConfig, GlmForCausalLM

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.chatglm2_and_3 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from glmtune.models.tokenizers.load import load_tokenizer_folder

TEXTS = ["你好", "How many apples are left?", "[gMASK]sop", "a  b\n\n c", "😀 和 <|user|>\nhi", ""]


@pytest.fixture
def tokenizer(tiny_tokenizer_folder):
    return load_tokenizer_folder(tiny_tokenizer_folder, Family.CHATGLM2)


@pytest.fixture(params=[Family.CHATGLM2, Family.CHATGLM3])
def either(request, tiny_tokenizer_folder):
    return load_tokenizer_folder(tiny_tokenizer_folder, request.param)


def test_encoding_and_decoding_is_lossless(either):
    for text in TEXTS:
        ids = either.encode(text, add_special_tokens=False)
        assert ids == either.sp_model.EncodeAsIds(text) == either.text_ids(text)
        assert either.decode(ids) == text
        assert either.encode(text) == [*either.prefix_ids, *ids]
        assert either.num_special_tokens_to_add() == len(either.encode(""))
    assert either.prefix_ids == [either.get_command("[gMASK]"), either.get_command("sop")]


def test_command_names_in_text_stay_text(either):
    for name in either.COMMANDS:
        assert max(either.encode(f"say {name}!", add_special_tokens=False)) < either.sp_model.get_piece_size()


def test_role_names_are_recognised_only_where_asked_for(tiny_tokenizer_folder):
    tokenizer = ChatGLM3Tokenizer.from_pretrained(str(tiny_tokenizer_folder), encode_special_tokens=True)
    user = tokenizer.get_command("<|user|>")
    assert tokenizer.encode("<|user|>[gMASK]", add_special_tokens=False) == [
        user,
        *tokenizer.text_ids("[gMASK]"),
    ]
    assert user not in tokenizer.text_ids("<|user|>")
    tokenizer.encode_special_tokens = False
    assert user not in tokenizer.encode("<|user|>")


def test_vocabulary(either):
    vocab = either.get_vocab()
    assert (
        len(vocab)
        == len(either)
        == either.vocab_size
        == either.sp_model.get_piece_size() + len(either.COMMANDS)
    )
    assert sorted(vocab.values()) == list(range(len(either)))
    names = ["<unk>", "</s>", "▁", "[gMASK]", "sop"]
    assert either.convert_tokens_to_ids(names) == [vocab[name] for name in names]
    assert either.convert_tokens_to_ids("no such piece") == either.unk_token_id == 0
    assert either.convert_tokens_to_string(either.tokenize("How many?")) == "How many?"
    with pytest.raises(KeyError, match="<\\|nobody\\|>"):
        either.get_command("<|nobody|>")


def test_special_tokens(either):
    assert (either.pad_token, either.eos_token, either.bos_token) == ("<unk>", "</s>", None)
    assert set(either.all_special_ids) == {0, 2, *(either.get_command(name) for name in either.COMMANDS)}
    ids = either.encode("hi", "ho")
    assert either.get_special_tokens_mask(ids, already_has_special_tokens=True) == [
        int(index in either.all_special_ids) for index in ids
    ]
    assert either.get_special_tokens_mask([5, 6], [7]) == [1, 1, 0, 0, 0, 1]


def test_padding_side_is_left_unless_set(either):
    texts = ["hi", "How many apples are left?"]
    left = either(texts, padding=True, return_tensors="pt")
    num = int(left["attention_mask"][0].sum())
    length = left["input_ids"].shape[1]
    assert left["attention_mask"][0].tolist() == [0] * (length - num) + [1] * num
    assert left["position_ids"][0].tolist() == [0] * (length - num) + list(range(num))
    either.padding_side = "right"
    right = either(texts, padding=True, return_tensors="pt")
    assert right["input_ids"][0].tolist() == left["input_ids"][0, length - num :].tolist() + [0] * (
        length - num
    )
    assert right["attention_mask"][0].tolist() == [1] * num + [0] * (length - num)
    assert right["position_ids"][0].tolist() == list(range(num)) + [0] * (length - num)
    assert either(texts, padding=True, padding_side="left")["input_ids"] == left["input_ids"].tolist()


def test_padding_of_encoded_rows(either):
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    batch = DataCollatorWithPadding(either)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    batch = either.pad(
        {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]}, padding="max_length", max_length=4
    )
    assert batch["position_ids"] == [0, 0, 0, 1]
    batch = either.pad(rows, pad_to_multiple_of=4, padding_side="right", return_attention_mask=False)
    assert batch["input_ids"] == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert "attention_mask" not in batch


def test_position_ids_can_be_left_out(tokenizer):
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert set(tokenizer(["hi", "How many?"], padding=True)) == {"input_ids", "attention_mask"}


def test_truncation_keeps_the_start_unless_set(tokenizer):
    whole = tokenizer.encode("How many apples are left?")
    assert tokenizer.encode("How many apples are left?", truncation=True, max_length=5) == whole[:5]
    tokenizer.truncation_side = "left"
    assert (
        tokenizer.encode("How many apples are left?", truncation=True, max_length=5) == whole[:2] + whole[-3:]
    )


@pytest.mark.parametrize(
    ("pad", "index"), [("</s>", 2), ("[MASK]", None), ("<pad>", 0)], ids=["end", "command", "alias"]
)
def test_pad_token_can_be_set(either, pad, index):
    either.pad_token = pad
    expected = either.get_command(pad) if index is None else index
    assert either.pad_token_id == expected
    assert either(["hi", "How many apples are left?"], padding=True)["input_ids"][0][0] == expected


def test_pad_token_can_be_set_by_id(either):
    for index in (2, either.get_command("eop"), 0):
        either.pad_token_id = index
        assert either.pad_token_id == index
        assert either(["hi", "How many apples are left?"], padding=True)["input_ids"][0][0] == index


def test_decoding_takes_what_models_give(either):
    ids = either.encode("How many?")
    end = [either.eos_token_id, len(either) + 40, 10**6]
    skipped = either.decode(either.text_ids("How many?") + end)
    assert skipped == "How many?"
    assert either.decode(torch.tensor(ids + end)) == either.decode(ids)
    assert either.batch_decode(torch.tensor([ids, ids])) == [either.decode(ids)] * 2
    assert either.decode([]) == ""
    assert either.decode([-100, *either.text_ids("hi")]) == "hi"
    assert either.decode(either.text_ids("a ,b"), clean_up_tokenization_spaces=True) == "a,b"


def test_chatglm3_names_command_tokens_and_chatglm2_drops_them(tiny_tokenizer, tiny_chatglm3_tokenizer):
    ids = tiny_tokenizer.encode("hi")
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == tiny_tokenizer.decode(ids) == "hi"
    for skip in (True, False):
        assert tiny_chatglm3_tokenizer.decode(ids, skip_special_tokens=skip) == "[gMASK]sop hi"


def test_half_a_surrogate_pair_becomes_the_replacement_character(either):
    assert either.decode(either.text_ids("a\ud83d b")) == "a\ufffd b"
    assert either.decode(either.text_ids("\ud83d\ude00")) == "😀"


@pytest.mark.parametrize("special", [True, False])
def test_tokens_can_be_added(either, tmp_path, special):
    size = len(either)
    added = {"extra_special_tokens": ["<city>"]}
    assert (either.add_special_tokens(added) if special else either.add_tokens(["<city>"])) == 1
    assert either.add_tokens(["<city>", "sop", "</s>", "<pad>", "▁"]) == 0
    assert (len(either), either.vocab_size, either.get_vocab()["<city>"]) == (size + 1, size, size)
    either.save_pretrained(tmp_path)
    for tokenizer in (either, load_tokenizer_folder(tmp_path, either.family)):
        ids = tokenizer.encode("in <city>!", add_special_tokens=False)
        assert ids == [*tokenizer.text_ids("in "), size, *tokenizer.text_ids("!")]
        assert tokenizer.tokenize("<city>") == ["<city>"]
        assert "<city>" in tokenizer.decode(ids)
        assert ("<city>" in tokenizer.decode(ids, skip_special_tokens=True)) is not special
        assert len(tokenizer) == size + 1


def test_saved_and_read_again(either, tiny_tokenizer_folder, tmp_path):
    either.save_pretrained(tmp_path)
    model = (tmp_path / "tokenizer.model").read_bytes()
    assert model == (tiny_tokenizer_folder / "tokenizer.model").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == {
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
        "do_lower_case": False,
        "glmtune_family": either.family.value,
        "remove_space": False,
        "tokenizer_class": "ChatGLMTokenizer",
    }
    again = load_tokenizer_folder(tmp_path, either.family)
    assert type(again) is type(either)
    assert again(TEXTS, padding=True) == either(TEXTS, padding=True)
    again.save_pretrained(tmp_path / "second")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_settings_survive_saving(tiny_tokenizer_folder, tmp_path):
    tokenizer = ChatGLM3Tokenizer.from_pretrained(
        str(tiny_tokenizer_folder), padding_side="right", pad_token="</s>", encode_special_tokens=True
    )
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer_folder(tmp_path, Family.CHATGLM3)
    assert isinstance(again, ChatGLM3Tokenizer)
    assert (again.padding_side, again.pad_token_id, again.encode_special_tokens) == ("right", 2, True)


def test_settings_files_of_other_tools_load(tiny_tokenizer_folder, tiny_chatglm3_tokenizer, tmp_path):
    """Command tokens listed as added tokens, and a Jinja template, as later official files have them."""
    shutil.copy(tiny_tokenizer_folder / "tokenizer.model", tmp_path)
    user = tiny_chatglm3_tokenizer.get_command("<|user|>")
    token = {
        "content": "<|user|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    }
    config = {
        "added_tokens_decoder": {str(user): {**token, "special": False}},
        "additional_special_tokens": ["<|user|>"],
        "chat_template": "{{ messages }}",
        "tokenizer_class": "ChatGLMTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer_folder(tmp_path, Family.CHATGLM3)
    assert len(tokenizer) == len(tiny_chatglm3_tokenizer)
    assert tokenizer.encode("<|user|>") == tiny_chatglm3_tokenizer.encode("<|user|>")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>\nhi"


def test_without_settings_file(tiny_tokenizer_folder, tiny_tokenizer, tmp_path):
    shutil.copy(tiny_tokenizer_folder / "tokenizer.model", tmp_path)
    assert load_tokenizer_folder(tmp_path, Family.CODEGEEX2).encode("hi") == tiny_tokenizer.encode("hi")


def test_families_and_classes(tiny_tokenizer_folder):
    classes = {
        Family.CHATGLM2: ChatGLM2Tokenizer,
        Family.CHATGLM2_32K: ChatGLM2Tokenizer,
        Family.CODEGEEX2: ChatGLM2Tokenizer,
        Family.CHATGLM3: ChatGLM3Tokenizer,
        Family.CHATGLM3_32K: ChatGLM3Tokenizer,
    }
    for family, tokenizer_class in classes.items():
        tokenizer = load_tokenizer_folder(tiny_tokenizer_folder, family)
        assert type(tokenizer) is tokenizer_class
        assert tokenizer.family is family
    assert ChatGLM2Tokenizer.from_pretrained(str(tiny_tokenizer_folder)).family is Family.CHATGLM2


def identity_state(tokenizer):
    return {key: value for key, value in tokenizer.__dict__.items() if key not in ("sp_model", "tokens_trie")}


def test_pickled_and_copied(either):
    either.add_tokens(["<city>"])
    before = Hasher.hash(either)
    expected = either(TEXTS, padding=True)
    assert Hasher.hash(either) == before, "a cached datasets.map must find its result again"
    for twin in (pickle.loads(pickle.dumps(either)), copy.deepcopy(either)):
        assert twin(TEXTS, padding=True) == expected
        assert twin.encode("<city>") == either.encode("<city>")
        assert identity_state(twin).keys() == identity_state(either).keys()


def test_in_worker_processes(either):
    rows = Dataset.from_dict({"text": TEXTS[:4]})
    mapped = rows.map(lambda row: {"ids": either.encode(row["text"])}, num_proc=2)
    assert mapped["ids"][:] == [either.encode(text) for text in TEXTS[:4]]
    loader = DataLoader(
        TEXTS[:4], batch_size=2, num_workers=1, collate_fn=lambda texts: either(texts, padding=True)
    )
    assert [batch["input_ids"] for batch in loader] == [
        either(TEXTS[0:2], padding=True)["input_ids"],
        either(TEXTS[2:4], padding=True)["input_ids"],
    ]


def test_generation_with_left_padding_equals_single_rows(tokenizer):
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attention_bias=True,
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.3,
    )
    model = GlmForCausalLM(config).eval()
    texts = ["hi", "How many apples are left?"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), **options)
    for text, row in zip(texts, batch, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)
        assert row[-8:].tolist() == alone[0, -8:].tolist()
    beams = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), num_beams=2, **options)
    assert beams.shape[0] == 2


def test_missing_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no `tokenizer.model`.*found: config.json.*official release"):
        load_tokenizer_folder(tmp_path, Family.CHATGLM2)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer_folder(tmp_path / "none", Family.CHATGLM2)
    with pytest.raises(CheckpointError, match=r"nowhere.model does not exist.*Download"):
        ChatGLM2Tokenizer(str(tmp_path / "nowhere.model"))


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"not a model", "11 bytes.*no sentencepiece model"),
        (b"version https://git-lfs.x/v1\noid", "git lfs pull"),
    ],
)
def test_broken_file_is_named(tmp_path, content, hint):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"tokenizer.model.*{hint}"):
        load_tokenizer_folder(tmp_path, Family.CHATGLM2)


def test_added_token_on_a_taken_id_is_refused(tiny_tokenizer_folder, tmp_path):
    shutil.copy(tiny_tokenizer_folder / "tokenizer.model", tmp_path)
    token = {"content": "<city>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"300": token}}))
    with pytest.raises(CheckpointError, match=r"'<city>' the id 300, but ids below \d+ are taken"):
        load_tokenizer_folder(tmp_path, Family.CHATGLM2)
