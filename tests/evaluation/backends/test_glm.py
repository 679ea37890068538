"""The model backend: prompts to ids, choices to tokens, the model's identity."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from evaluation.backend import Backend, Limits
from evaluation.backends.glm import GlmBackend, hash_tensors, identify
from evaluation.backends.prompt_encoder import PromptEncoder, check_marks, is_chat_model
from evaluation.sample import Prompt
from glmtune.adapter import load_adapter
from glmtune.errors import ConfigError, DataError
from glmtune.inference.predict.generate import generate_ids
from glmtune.inference.settings import EngineSettings, GenerationSettings
from glmtune.loading import load_model, load_tokenizer
from glmtune.messages import Message
from glmtune.models.releases.families import Family
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

QUESTION = "How many apples are left? There are 12 - 7 = "


@pytest.fixture(scope="module")
def backend(tiny_base) -> Backend:
    model, tokenizer = load_model(tiny_base, device="cpu"), load_tokenizer(tiny_base)
    return GlmBackend(model, tokenizer, name="chatglm2-tiny", settings=EngineSettings(batch_size=3))


def chat(text: str) -> Prompt:
    return Prompt(turns=(Message("user", text),))


def test_text_and_turns_are_encoded_as_in_training(tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer)
    marks = [tiny_tokenizer.get_command("[gMASK]"), tiny_tokenizer.get_command("sop")]
    assert encoder.ids(Prompt(text=QUESTION)) == (*marks, *tiny_tokenizer.text_ids(QUESTION))
    rendered = f"[Round 1]\n\n问：{QUESTION}\n\n答："
    assert encoder.ids(chat(QUESTION)) == (*marks, *tiny_tokenizer.text_ids(rendered))


def test_gmask_and_sop_are_there_exactly_once():
    check_marks([7, 8, 1, 2], [7, 8])
    with pytest.raises(
        DataError, match=r"\(ids \[7, 8\]\) exactly once, but this one holds them \[2, 1\] times"
    ):
        check_marks([7, 8, 1, 7], [7, 8])
    with pytest.raises(DataError, match=r"\[1, 0\] times"):
        check_marks([7, 1, 2], [7, 8])


def test_names_of_special_tokens_in_a_question_stay_text(tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer)
    assert len(encoder.ids(Prompt(text="[gMASK]sop what is [gMASK]?"))) > 6


def test_completions_equal_the_plain_path(backend, tiny_base):
    prompts = [Prompt(text=QUESTION * repeat) for repeat in (1, 3, 2)] + [
        chat(f"{QUESTION}{i}?") for i in range(4)
    ]
    made = dict(backend.generate(prompts, Limits(12)))
    model, tokenizer = load_model(tiny_base, device="cpu"), load_tokenizer(tiny_base)
    ids = [PromptEncoder(tokenizer).ids(prompt) for prompt in prompts]
    settings = GenerationSettings(max_new_tokens=12, batch_size=1)
    for plain in generate_ids(model, ids, settings, stop_ids=[tokenizer.end_id], pad_id=0):
        answer = made[plain.index]
        assert answer.text == tokenizer.decode(list(plain.token_ids), skip_special_tokens=True)
        assert answer.stop_reason == plain.stop_reason
        assert answer.num_new_tokens == plain.num_new_tokens
        assert answer.num_prompt_tokens == len(ids[plain.index]) == backend.count_tokens(prompts[plain.index])


def test_choices_are_the_next_token_of_the_whole_prompt(backend, tiny_base):
    prompts = [Prompt(text=f"问：{QUESTION * (1 + place % 3)}答：") for place in range(5)]
    scores = dict(backend.score_choices(prompts, ("1", "2", "3")))
    model, tokenizer = load_model(tiny_base, device="cpu"), load_tokenizer(tiny_base)
    for place, prompt in enumerate(prompts):
        ids = [*tokenizer.prefix_ids, *tokenizer.text_ids(prompt.text)]
        letters = [tokenizer.text_ids(prompt.text + letter)[-1] for letter in "123"]
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[letters]
        torch.testing.assert_close(torch.tensor(scores[place].logprobs), expected, atol=1e-5, rtol=0)
        assert scores[place].num_prompt_tokens == len(ids)


def test_choices_of_a_chat_are_answers(tiny_tokenizer, tiny_chatglm3_tokenizer):
    context, ids = PromptEncoder(tiny_tokenizer).choice_ids(chat("?"), (" 1", " 2"))
    assert context == (*PromptEncoder(tiny_tokenizer).ids(chat("?")), *tiny_tokenizer.text_ids(" 1")[:-1])
    assert ids == [tiny_tokenizer.text_ids(" 1")[-1], tiny_tokenizer.text_ids(" 2")[-1]]
    encoder = PromptEncoder(tiny_chatglm3_tokenizer)
    context, ids = encoder.choice_ids(chat("?"), ("1", "2"))
    prompt = encoder.ids(chat("?"))
    assert prompt[-1] == tiny_chatglm3_tokenizer.get_command("<|assistant|>")
    assert context[: len(prompt)] == prompt
    assert len(context) > len(prompt)  # the line break that every answer begins with
    assert len(set(ids)) == 2


def test_chatglm_6b_answers_behind_its_marks(released_tokenizers):
    tokenizer = load_tokenizer(released_tokenizers / "chatglm-6b")
    encoder = PromptEncoder(tokenizer)
    for prompt in (Prompt(text="答案："), chat("答案：")):
        context, ids = encoder.choice_ids(prompt, tuple("ABCD"))
        assert list(context[-2:]) == [130001, 130004]
        assert context == encoder.ids(prompt)
        assert ids == [167, 333, 251, 416]  # what C-Eval's own script compares for ChatGLM-6B


def test_letters_of_chatglm2_are_those_of_the_official_script(released_tokenizers):
    encoder = PromptEncoder(load_tokenizer(released_tokenizers / "chatglm2-6b"))
    assert encoder.choice_ids(chat("1+1=?"), tuple("ABCD"))[1] == [316, 347, 319, 367]
    assert encoder.choice_ids(Prompt(text="1+1=?\nAnswer:"), (" A", " B", " C", " D"))[1] == [
        316,
        347,
        319,
        367,
    ]
    direct = encoder.choice_ids(Prompt(text="1+1=?\n答案："), tuple("ABCD"))[1]
    assert len(set(direct)) == 4
    assert not set(direct) & {316, 347, 319, 367}  # behind a full-width colon the pieces have no blank


def test_a_choice_of_several_tokens_is_an_error(tiny_tokenizer):
    encoder = PromptEncoder(tiny_tokenizer)
    with pytest.raises(DataError, match=r"'apples left' must be one token.*the tokens of the choices are \["):
        encoder.choice_ids(Prompt(text=QUESTION), ("5", "apples left"))
    with pytest.raises(DataError, match=r"The choices '5', '5' must differ"):
        encoder.choice_ids(Prompt(text=QUESTION), ("5", "5"))


def test_a_prompt_beyond_the_context_is_an_error(backend):
    with pytest.raises(ConfigError, match="longest prompt has"):
        list(backend.generate([Prompt(text=QUESTION * 60)], Limits(8)))


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("chatglm-6b", Family.CHATGLM, True),
        ("THUDM/chatglm2-6b-32k", Family.CHATGLM2_32K, True),
        ("chatglm2-6b-int4", Family.CHATGLM2, True),
        ("chatglm3-6b", Family.CHATGLM3, True),
        ("zai-org/chatglm3-6b-base", Family.CHATGLM3, False),
        ("/models/chatglm3-6b-base/", Family.CHATGLM3, False),
        ("codegeex2-6b", Family.CODEGEEX2, False),
        ("glm-4-9b", Family.GLM4, False),
        ("glm-4-9b-chat", Family.GLM4, True),
        ("glm-4-9b-chat-1m", Family.GLM4, True),
        ("/data/base_models/chatglm2-6b", Family.CHATGLM2, True),
        ("glm-tiny", Family.CHATGLM2, True),
    ],
)
def test_chat_or_base_by_the_name(name, family, expected):
    assert is_chat_model(name, family) is expected


def test_identity_tells_weights_prefix_and_adapter_apart(tiny_base, tmp_path):
    from peft import LoraConfig, get_peft_model

    def fresh():
        return load_model(tiny_base, device="cpu")

    plain = identify(fresh(), Family.CHATGLM2)
    assert plain == identify(fresh(), Family.CHATGLM2)
    assert (plain.family, plain.dtype, plain.quantization, plain.adapter) == (
        "chatglm2",
        "float32",
        "none",
        "none",
    )
    assert plain.is_chat
    assert not identify(fresh(), Family.CHATGLM2, is_chat=False).is_chat
    assert (
        identify(load_model(tiny_base, device="cpu", dtype="bfloat16"), Family.CHATGLM2).dtype == "bfloat16"
    )

    changed = fresh()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1e-3
    assert identify(changed, Family.CHATGLM2).weights_hash != plain.weights_hash

    tuned = fresh()
    attach_prefix(tuned, PrefixEncoder(prefix_shape(tuned.config), pre_seq_len=4))
    with_prefix = identify(tuned, Family.CHATGLM2)
    assert with_prefix.weights_hash == plain.weights_hash
    assert with_prefix.adapter != "none"

    adapted = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with_lora = identify(load_adapter(tmp_path / "adapter", fresh(), check_base=False), Family.CHATGLM2)
    assert with_lora.weights_hash == plain.weights_hash
    assert with_lora.adapter not in ("none", with_prefix.adapter)


def test_what_lies_beside_the_weights_is_in_the_identity_too(tiny_base, tmp_path):
    """The same tensors give other numbers by another configuration, vocabulary or factor of an adapter."""
    from peft import LoraConfig, get_peft_model

    tokenizer = load_tokenizer(tiny_base)

    def identity(model, tokenizer=tokenizer):
        return GlmBackend(model, tokenizer).identity

    plain = identity(load_model(tiny_base, device="cpu"))
    assert len(plain.config_hash) == 16
    assert plain == identity(load_model(tiny_base, device="cpu"))

    folder = tmp_path / "stretched"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_ratio"] = 4 * config.get("rope_ratio", 1)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stretched = identity(load_model(folder, device="cpu"))
    assert stretched.weights_hash == plain.weights_hash
    assert stretched.config_hash != plain.config_hash

    def adapted(alpha):
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"])
        return identity(get_peft_model(load_model(tiny_base, device="cpu"), config))

    weak, strong = adapted(2), adapted(16)
    assert weak.adapter == strong.adapter != "none"
    assert weak.config_hash != strong.config_hash

    richer = load_tokenizer(tiny_base)
    richer.add_tokens(["apples"])
    assert identity(load_model(tiny_base, device="cpu"), richer).config_hash != plain.config_hash


def test_hash_covers_name_shape_type_and_values():
    tensor = torch.arange(12.0)
    hashes = [
        hash_tensors({"a": tensor}),
        hash_tensors({"b": tensor}),
        hash_tensors({"a": tensor.reshape(3, 4)}),
        hash_tensors({"a": tensor.to(torch.bfloat16)}),
        hash_tensors({"a": tensor + 1}),
        hash_tensors({"a": tensor.to(torch.int8)}),
    ]
    assert len(set(hashes)) == len(hashes)


def test_quantization_is_what_the_model_says(tiny_base):
    quantized = identify(load_model(tiny_base, device="cpu", quantization="int8"), Family.CHATGLM2)
    assert quantized.quantization == "int8"
    assert (
        quantized.weights_hash != identify(load_model(tiny_base, device="cpu"), Family.CHATGLM2).weights_hash
    )
    other = load_model(tiny_base, device="cpu")
    other.config.quantization_config = {"quant_method": "torchao"}
    assert identify(other, Family.CHATGLM2).quantization == "torchao"


def test_embedded_model_end_to_end():
    backend = GlmBackend(load_model("glm-tiny", device="cpu"), load_tokenizer("glm-tiny"))
    assert backend.identity.name == "glm-tiny"
    shots = "".join(f"问：{a}加{a}等于多少？\n答：{2 * a}\n\n" for a in range(1, 30))
    prompts = [Prompt(text=f"{shots}问：{a}加3等于多少？\n答：") for a in range(6)]
    made = dict(backend.generate(prompts, Limits(20, ("\n\n",))))
    assert sorted(made) == list(range(6))
    assert all("\n\n" not in answer.text for answer in made.values())
    scores = dict(backend.score_choices(prompts, ("1", "2")))
    assert all(value < 0 for answer in scores.values() for value in answer.logprobs)
