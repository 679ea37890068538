"""`chat` and `stream_chat` of the generations that differ most: ChatGLM-6B, the programs of ChatGLM3, GLM-4."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glmtune.errors import ConfigError
from glmtune.loading import load_tokenizer
from glmtune.messages import Message
from glmtune.models.architectures.chatglm_config import ChatGlmConfig
from glmtune.models.chat.chat import ChatTurn, generate_settings
from glmtune.models.checkpoints.config import native_config
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.models.official import OfficialChatGlmForCausalLM
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import render_prompt, template_for
from glmtune.prefix.attach import attach_prefix, detach_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from tests.models.chat.test_chat import GREEDY, SYSTEM, check_carried_cache, last, scripted

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.fixture(scope="module")
def chatglm():
    tokenizer = load_tokenizer(GOLDEN / "tokenizers" / "chatglm", family="chatglm")
    torch.manual_seed(0)
    config = ChatGlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.get_command("<sop>"),
        eos_token_id=tokenizer.end_id,
        mask_token_id=tokenizer.get_command("[MASK]"),
        gmask_token_id=tokenizer.get_command("[gMASK]"),
    )
    return OfficialChatGlmForCausalLM(config).eval(), tokenizer


def special_ids(tokenizer) -> list[int]:
    """Ids that show nothing; a random model must write others to say something."""
    return [index for index in range(len(tokenizer)) if not tokenizer.decode([index]).strip(" \n\ufffd")]


class TestChatGlm:
    def test_history_and_response(self, chatglm):
        model, tokenizer = chatglm
        said = [*tokenizer.text_ids("你好,世界!"), tokenizer.end_id]
        response, history = model.chat(tokenizer, "hi", history=[("你好", "你好！")], **scripted(*said))
        assert response == "你好，世界！"
        assert history == [("你好", "你好！"), ("hi", "你好，世界！")]

    def test_both_give_the_same_answer(self, chatglm):
        model, tokenizer = chatglm
        settings = {"max_new_tokens": 12, "suppress_tokens": special_ids(tokenizer)}
        torch.manual_seed(3)
        whole = model.chat(tokenizer, "你好", **settings)
        torch.manual_seed(3)
        assert last(model.stream_chat(tokenizer, "你好", **settings)) == whole
        assert whole[0]

    def test_prefix(self, chatglm):
        model, tokenizer = chatglm
        settings = {"max_new_tokens": 12, "suppress_tokens": special_ids(tokenizer), **GREEDY}
        bare = model.chat(tokenizer, "你好", **settings)
        encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4)
        torch.nn.init.normal_(encoder.embedding.weight, std=50.0)
        attach_prefix(model, encoder.eval())
        tuned = model.chat(tokenizer, "你好", **settings)
        assert last(model.stream_chat(tokenizer, "你好", **settings)) == tuned != bare
        detach_prefix(model)
        assert model.chat(tokenizer, "你好", **settings) == bare

    def test_no_cache_across_turns(self, chatglm):
        model, tokenizer = chatglm
        with pytest.raises(ConfigError, match=r"ChatGLM-6B every token of the prompt sees all others"):
            next(model.stream_chat(tokenizer, "你好", return_past_key_values=True))

    def test_image_tokens_in_front(self, chatglm, monkeypatch):
        model, tokenizer = chatglm
        monkeypatch.setattr(tokenizer, "num_image_tokens", 20000)
        *_, repair = generate_settings(model, ChatTurn(tokenizer, (), "", "user"), 5, {})["logits_processor"]
        assert repair.safe_token == 20005


class TestGlm4:
    @pytest.fixture(scope="class")
    def glm4(self):
        tokenizer = load_tokenizer(GOLDEN / "tokenizers" / "glm4", family="glm4")
        official = read_config(GOLDEN / "models" / "glm4")
        stop_ids = template_for(tokenizer).stop_ids(tokenizer)
        official |= {"padded_vocab_size": len(tokenizer), "eos_token_id": list(stop_ids)}
        torch.manual_seed(0)
        return OfficialGlmForCausalLM(native_config(official, Family.GLM4)).float().eval(), tokenizer

    def test_tool_call(self, glm4):
        model, tokenizer = glm4
        said = [
            *tokenizer.text_ids('get_weather\n{"city": "北京"}'),
            tokenizer.get_command("<|observation|>"),
        ]
        response, history = model.chat(tokenizer, "北京天气", history=[SYSTEM], **scripted(*said))
        assert response == {"name": "get_weather", "parameters": {"city": "北京"}}
        assert history[-1] == {
            "role": "assistant",
            "metadata": "get_weather",
            "content": '{"city": "北京"}',
        }

    def test_equal_responses_with_and_without_a_cache(self, glm4):
        model, tokenizer = glm4
        said = [*tokenizer.text_ids("\n"), *tokenizer.text_ids("你好"), tokenizer.end_id]
        stream = model.stream_chat(tokenizer, "hi", return_past_key_values=True, **scripted(*said))
        _, history, cache = last(stream)
        settings = {"max_new_tokens": 8, **GREEDY}
        stream = model.stream_chat(tokenizer, "再见", history, past_key_values=cache, **settings)
        assert last(stream) == model.chat(tokenizer, "再见", history, **settings)
        check_carried_cache(model, tokenizer)


def test_a_program_of_chatglm3_and_what_it_printed(tiny_base, tiny_chatglm3_tokenizer) -> None:
    """The code interpreter: a system message of words, a program under `interpreter`, its output, an answer."""
    tokenizer = tiny_chatglm3_tokenizer
    model = OfficialGlmForCausalLM(native_config(read_config(tiny_base), Family.CHATGLM3)).eval()
    program = "```python\n1 + 2\n```"
    said = [*tokenizer.text_ids(f"interpreter\n{program}"), tokenizer.get_command("<|observation|>")]
    words = {"role": "system", "content": "Write Python to answer."}
    response, history = model.chat(tokenizer, "1 + 2 = ?", history=[words], **scripted(*said))
    assert response == {"name": "interpreter", "content": program}
    assert history[1:] == [
        {"role": "user", "content": "1 + 2 = ?"},
        {"role": "assistant", "metadata": "interpreter", "content": program},
    ]
    said = [*tokenizer.text_ids("\n"), *tokenizer.text_ids("3"), tokenizer.end_id]
    answer, longer = model.chat(tokenizer, "3", history=history, role="observation", **scripted(*said))
    assert answer == "3"
    assert [message["role"] for message in longer] == [
        "system",
        "user",
        "assistant",
        "observation",
        "assistant",
    ]

    def message(role: str, metadata: str, content: str) -> list[int]:
        texts = tokenizer.text_ids(f"{metadata}\n") + tokenizer.text_ids(content)
        return [tokenizer.get_command(f"<|{role}|>"), *texts]

    messages = ChatTurn(tokenizer, history, "3", "observation").messages()
    assert template_for(tokenizer).encode_prompt(tokenizer, messages) == [
        *tokenizer.prefix_ids,
        *message("system", "", "Write Python to answer."),
        *message("user", "", "1 + 2 = ?"),
        *message("assistant", "interpreter", program),
        *message("observation", "", "3"),
        tokenizer.get_command("<|assistant|>"),
    ]


class TestSystemMessages:
    """A system message reaches the prompt of every generation as training renders it."""

    @pytest.mark.parametrize(
        "family", [family.value for family in Family if family is not Family.TRANSFORMERS]
    )
    def test_as_training_renders_it(self, family, tiny_chatglm3_tokenizer, tiny_tokenizer, chatglm):
        template = template_for(family)
        tokenizer = tiny_chatglm3_tokenizer if template.knows_tools else tiny_tokenizer
        tokenizer = chatglm[1] if template.bidirectional_context else tokenizer
        turn = ChatTurn(tokenizer, (), "hi", "user", system="Be short.")
        in_history = ChatTurn(tokenizer, [{"role": "system", "content": "Be short."}], "hi", "user")
        expected = [Message("system", "Be short."), Message("user", "hi")]
        assert turn.messages() == in_history.messages() == expected
        assert template.render(turn.messages()) == render_prompt(
            "hi", system="Be short.", template=template.name
        )

    def test_it_stays_in_the_history_it_came_with(self, chatglm):
        model, tokenizer = chatglm
        said = [*tokenizer.text_ids("你好"), tokenizer.end_id]
        system = {"role": "system", "content": "Be short."}
        _, history = model.chat(tokenizer, "hi", history=[system], **scripted(*said))
        assert history == [system, ("hi", "你好")]
        turn = ChatTurn(tokenizer, history, "again", "user")
        assert [message.role for message in turn.messages()] == ["system", "user", "assistant", "user"]


def test_stop_strings(chatglm):
    model, tokenizer = chatglm
    said = [*tokenizer.text_ids("你好世界你好"), tokenizer.end_id]
    stops = {"stop_strings": ["世界"]}
    response, _ = model.chat(tokenizer, "hi", **stops, **scripted(*said))
    streamed = last(model.stream_chat(tokenizer, "hi", **stops, **scripted(*said)))[0]
    assert response == streamed == "你好世界"
