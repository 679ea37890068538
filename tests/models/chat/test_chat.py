"""`chat` and `stream_chat`: the examples of the releases' READMEs, histories, stops, and the carried cache."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from glmtune.errors import ConfigError, DataError
from glmtune.loading import load_model, load_tokenizer
from glmtune.models.chat.chat import ChatTurn, generate_settings
from glmtune.models.chat.defaults import CHAT_DEFAULTS
from glmtune.models.chat.stream import SAFE_TOKEN, RepairScores
from glmtune.models.checkpoints.config import native_config
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.later import OfficialGlmForCausalLM
from glmtune.models.releases.families import Family
from glmtune.prefix.attach import attach_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
GREEDY = {"do_sample": False}


@pytest.fixture(scope="module")
def tiny():
    return load_model("glm-tiny", device="cpu"), load_tokenizer("glm-tiny")


@pytest.fixture(scope="module")
def chatglm3(tiny_base, tiny_chatglm3_tokenizer):
    torch.manual_seed(1)
    config = native_config(read_config(tiny_base), Family.CHATGLM3)
    return OfficialGlmForCausalLM(config).eval(), tiny_chatglm3_tokenizer


class Script(LogitsProcessor):
    """Makes a model write given tokens."""

    def __init__(self, *token_ids: int) -> None:
        self.waiting = list(token_ids)

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.waiting.pop(0)] = 0.0
        return forced


def scripted(*token_ids: int) -> dict[str, object]:
    return {"logits_processor": LogitsProcessorList([Script(*token_ids)])}


def last(stream):
    *_, item = stream
    return item


class TestReadmeExamples:
    def test_chat(self, tiny):
        model, tokenizer = tiny
        response, history = model.chat(tokenizer, "你好", history=[], **GREEDY)
        assert response
        assert history == [("你好", response)]
        again, longer = model.chat(tokenizer, "晚上睡不着应该怎么办", history=history, **GREEDY)
        assert longer == [("你好", response), ("晚上睡不着应该怎么办", again)]
        assert history == [("你好", response)], "the history given is left as it is"

    def test_stream_chat(self, tiny):
        model, tokenizer = tiny
        past_key_values, history = None, []
        for query in ("你好", "3 + 4 = ?"):
            stream = model.stream_chat(
                tokenizer,
                query,
                history=history,
                past_key_values=past_key_values,
                return_past_key_values=True,
            )
            for response, history, past_key_values in stream:
                assert history[-1] == (query, response)
                assert len(past_key_values.token_ids) > len(query)
        assert [query for query, _ in history] == ["你好", "3 + 4 = ?"]

    @pytest.mark.parametrize("settings", [GREEDY, {}, {"repetition_penalty": 1.3, "top_k": 5}])
    def test_both_give_the_same_answer(self, tiny, settings):
        model, tokenizer = tiny
        torch.manual_seed(3)
        whole = model.chat(tokenizer, "介绍一下北京", **settings)
        torch.manual_seed(3)
        parts = list(model.stream_chat(tokenizer, "介绍一下北京", **settings))
        assert parts[-1] == whole
        assert len(parts) > 3
        assert all(later[0].startswith(earlier[0]) for earlier, later in itertools.pairwise(parts))

    def test_beams(self, tiny):
        model, tokenizer = tiny
        response, _ = model.chat(tokenizer, "你好", num_beams=3, **GREEDY)
        assert response
        with pytest.raises(ConfigError, match=r"num_beams=3.*known only at its end"):
            next(model.stream_chat(tokenizer, "你好", num_beams=3))

    def test_lora_and_prefix(self):
        from peft import LoraConfig, get_peft_model

        model, tokenizer = load_model("glm-tiny", device="cpu"), load_tokenizer("glm-tiny")
        bare = model.chat(tokenizer, "你好", **GREEDY)
        torch.manual_seed(5)
        encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4)
        torch.nn.init.normal_(encoder.embedding.weight, std=2.0)
        attach_prefix(model, encoder)
        turns = [("你好", "你好！"), ("3 + 4 = ?", "7")]
        assert model.chat(tokenizer, "介绍一下北京", turns, max_new_tokens=8, **GREEDY) != bare
        check_carried_cache(model, tokenizer)
        adapted = get_peft_model(
            load_model("glm-tiny", device="cpu"), LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM")
        )
        assert adapted.eval().chat(tokenizer, "你好", **GREEDY) == bare


def check_carried_cache(model, tokenizer, queries=("你好", "3 + 4 = ?", "再见")) -> None:
    """Every answer of a conversation with a cache is the greedy one to all its tokens, and only new text is read."""
    cache, history, known = None, [], 0
    lengths: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, args, __: lengths.append(args[0].shape[1])
    )
    for query in queries:
        lengths.clear()
        stream = model.stream_chat(
            tokenizer,
            query,
            history,
            past_key_values=cache,
            return_past_key_values=True,
            max_new_tokens=12,
            **GREEDY,
        )
        _, history, cache = last(stream)
        num_read = lengths[0]
        assert lengths[1:] == [1] * (len(lengths) - 1)
        prompt, answer = cache.token_ids[: known + num_read], cache.token_ids[known + num_read :]
        known = cache.get_seq_length()
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            **GREEDY,
            eos_token_id=list(ChatTurn(tokenizer, (), "", "user").stop_ids),
        )
        assert expected[0, len(prompt) : len(prompt) + len(answer)].tolist() == answer
    hook.remove()


class TestCarriedCache:
    def test_equals_no_cache(self, tiny):
        check_carried_cache(*tiny)

    def test_equals_no_cache_with_roles(self, chatglm3):
        check_carried_cache(*chatglm3)

    def test_equal_responses(self, chatglm3):
        """An answer whose text encodes to the tokens written gives the same next turn without the cache."""
        model, tokenizer = chatglm3
        said = [*tokenizer.text_ids("\n"), *tokenizer.text_ids("5 apples"), tokenizer.end_id]
        stream = model.stream_chat(tokenizer, "How many?", return_past_key_values=True, **scripted(*said))
        _, history, cache = last(stream)
        settings = {"max_new_tokens": 8, **GREEDY}
        stream = model.stream_chat(tokenizer, "Which?", history, past_key_values=cache, **settings)
        assert last(stream) == model.chat(tokenizer, "Which?", history, **settings)

    def test_two_turns_from_one_cache(self, tiny):
        model, tokenizer = tiny
        _, history, cache = last(model.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY))
        tokens, length = list(cache.token_ids), cache.get_seq_length()

        def go_on(query):
            return last(model.stream_chat(tokenizer, query, history, past_key_values=cache, **GREEDY))

        first = go_on("3 + 4 = ?")
        go_on("介绍一下北京")
        assert go_on("3 + 4 = ?") == first
        assert (cache.token_ids, cache.get_seq_length()) == (tokens, length)

    def test_an_answer_cut_short_is_read_in_full(self, tiny):
        """The last token drawn is not in the cache yet; the next turn reads it with the new text."""
        model, tokenizer = tiny
        stream = model.stream_chat(tokenizer, "你好", return_past_key_values=True, max_new_tokens=4, **GREEDY)
        _, history, cache = last(stream)
        assert cache.get_seq_length() == len(cache.token_ids) - 1
        settings = {"return_past_key_values": True, "max_new_tokens": 6, **GREEDY}
        before = len(cache.token_ids)
        _, _, longer = last(model.stream_chat(tokenizer, "再见", history, past_key_values=cache, **settings))
        turn = ChatTurn(tokenizer, history, "再见", "user")
        new_text = turn.template.encode_continuation(tokenizer, turn.messages())
        assert longer.token_ids[before : before + len(new_text)] == new_text
        prompt = longer.token_ids[: before + len(new_text)]
        answer = longer.token_ids[len(prompt) :]
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, **GREEDY)
        assert expected[0, len(prompt) : len(prompt) + len(answer)].tolist() == answer

    def test_refusals(self, tiny):
        model, tokenizer = tiny
        with pytest.raises(ConfigError, match=r"a DynamicCache, but.*return_past_key_values=True"):
            next(model.stream_chat(tokenizer, "再见", [("a", "b")], past_key_values=DynamicCache()))
        _, _, cache = last(
            model.stream_chat(tokenizer, "你好", return_past_key_values=True, max_new_tokens=2)
        )
        with pytest.raises(
            ConfigError, match=rf"holds {len(cache.token_ids)} tokens, but `history` is empty"
        ):
            next(model.stream_chat(tokenizer, "再见", [], past_key_values=cache))


class TestStreaming:
    def test_stopping_early_stops_the_model(self, tiny):
        model, tokenizer = tiny
        forwards: list[object] = []
        hook = model.register_forward_hook(lambda *_: forwards.append(None))
        threads = threading.active_count()
        stream = model.stream_chat(tokenizer, "介绍一下北京", **GREEDY)
        next(stream)
        seen = len(forwards)
        stream.close()
        hook.remove()
        assert len(forwards) == seen
        assert threading.active_count() == threads
        assert torch.is_grad_enabled()

    def test_incomplete_characters_are_held_back(self, tiny):
        model, tokenizer = tiny
        word = tokenizer.text_ids("好")
        emoji = tokenizer.text_ids("😀")[-4:]
        script = [*word, *emoji, *word]
        assert "\ufffd" in tokenizer.decode([*word, *emoji[:-1]])
        seen = [
            response
            for response, _ in model.stream_chat(tokenizer, "?", **scripted(*script, tokenizer.end_id))
        ]
        assert list(dict.fromkeys(seen)) == ["好", "好😀", "好😀 好"]

    def test_an_incomplete_end_is_shown(self, tiny):
        """Cut short inside a character, the stream ends with what `chat` returns."""
        model, tokenizer = tiny
        script = [*tokenizer.text_ids("好"), *tokenizer.text_ids("😀")[-4:-1]]
        settings = {"max_new_tokens": len(script)}
        streamed = last(model.stream_chat(tokenizer, "?", **scripted(*script), **settings))
        assert streamed[0] == "好\ufffd\ufffd\ufffd"
        assert model.chat(tokenizer, "?", **scripted(*script), **settings) == streamed

    def test_an_empty_answer_is_a_turn(self, tiny):
        model, tokenizer = tiny
        assert list(model.stream_chat(tokenizer, "?", **scripted(tokenizer.end_id))) == [("", [("?", "")])]


SYSTEM = {
    "role": "system",
    "content": "Answer using tools.",
    "tools": [{"name": "get_weather", "description": "查询天气", "parameters": {"type": "object"}}],
}
CALL = "```python\ntool_call(city='北京')\n```"


class TestRoles:
    def write(self, tokenizer, text: str, stop: str | int) -> dict[str, object]:
        end = stop if isinstance(stop, int) else tokenizer.get_command(stop)
        return scripted(*tokenizer.text_ids(text), end)

    @pytest.mark.parametrize("stop", [2, "<|user|>", "<|observation|>"])
    def test_stops(self, chatglm3, stop):
        model, tokenizer = chatglm3
        said = self.write(tokenizer, "\n apples", stop)
        response, history = model.chat(tokenizer, "how many?", **said)
        assert response == "apples"
        assert history == [
            {"role": "user", "content": "how many?"},
            {"role": "assistant", "metadata": "", "content": "apples"},
        ]

    def test_tool_call_and_observation(self, chatglm3):
        model, tokenizer = chatglm3
        said = self.write(tokenizer, f"get_weather\n{CALL}", "<|observation|>")
        response, history = model.chat(tokenizer, "北京天气", history=[SYSTEM], **said)
        assert response == {"name": "get_weather", "parameters": {"city": "北京"}}
        assert history == [
            SYSTEM,
            {"role": "user", "content": "北京天气"},
            {"role": "assistant", "metadata": "get_weather", "content": CALL},
        ]
        result = json.dumps({"temp": 20})
        said = self.write(tokenizer, "\n 20度", tokenizer.end_id)
        response, history = model.chat(tokenizer, result, history=history, role="observation", **said)
        assert response == "20度"
        assert [message["role"] for message in history[1:]] == [
            "user",
            "assistant",
            "observation",
            "assistant",
        ]

    def test_stream_of_a_tool_call(self, chatglm3):
        model, tokenizer = chatglm3
        said = self.write(tokenizer, f"get_weather\n{CALL}", "<|observation|>")
        *partial, (response, _) = model.stream_chat(tokenizer, "北京天气", history=[SYSTEM], **said)
        assert response == {"name": "get_weather", "parameters": {"city": "北京"}}
        assert "get_weather".startswith(partial[0][0]), "a tool's name is one only from the line break on"
        assert set(partial[-12][0]) == {"name", "content"}, "an unfinished call is shown as it is"

    def test_prompts_equal_the_release(self, oracles):
        path = oracles / "tokenizers"
        tokenizer = load_tokenizer(path / "tiny_v2", family="chatglm3")
        cases = json.loads((path / "tiny_glm3.json").read_text(encoding="utf-8"))["chat_inputs"]
        assert cases
        for case in cases:
            turn = ChatTurn(tokenizer, case["history"], case["query"], case["role"])
            assert turn.template.encode_prompt(tokenizer, turn.messages()) == case["input_ids"][0]

    def test_continued_prompts_equal_the_release(self, oracles):
        path = oracles / "tokenizers"
        tokenizer = load_tokenizer(path / "tiny_v2", family="chatglm2")
        cases = json.loads((path / "tiny_v2.json").read_text(encoding="utf-8"))["continued_chat_inputs"]
        assert cases
        for case in cases:
            turn = ChatTurn(tokenizer, [("a", "b")] * case["turns_before"], case["query"], "user")
            assert turn.template.encode_continuation(tokenizer, turn.messages()) == case["ids"][0]

    def test_wrong_histories(self, tiny, chatglm3):
        model, tokenizer = tiny
        with pytest.raises(DataError, match=r"Turn 1 of the history.*\(query, response\) pairs"):
            model.chat(tokenizer, "?", history=["hi"])
        with pytest.raises(DataError, match="Message 2 has the role `user`"):
            model.chat(tokenizer, "?", history=[{"role": "user", "content": "hi"}])
        with pytest.raises(DataError, match="question in turn 1 of the history is None"):
            model.chat(tokenizer, "?", history=[[None, "hi"]])
        with pytest.raises(DataError, match="The question is None"):
            model.chat(tokenizer, None)
        with pytest.raises(DataError, match="`observation`"):
            model.chat(tokenizer, "?", role="observation")
        model, tokenizer = chatglm3
        with pytest.raises(DataError, match=r"Turn 1 of the history.*list of messages"):
            model.chat(tokenizer, "?", history=[("a", "b")])
        with pytest.raises(DataError, match="begins with a system message already"):
            model.chat(tokenizer, "?", history=[{"role": "system", "content": "a"}], system="b")


class TestSettings:
    def given(self, tiny, prompt_length=10, **settings):
        model, tokenizer = tiny
        return generate_settings(model, ChatTurn(tokenizer, (), "?", "user"), prompt_length, settings)

    def test_defaults_of_the_releases(self, tiny):
        assert {family: (d.max_length, d.top_p, d.temperature) for family, d in CHAT_DEFAULTS.items()} == {
            Family.CHATGLM: (2048, 0.7, 0.95),
            Family.CHATGLM2: (8192, 0.8, 0.8),
            Family.CHATGLM2_32K: (32768, 0.8, 0.8),
            Family.CODEGEEX2: (8192, 0.8, 0.8),
            Family.CHATGLM3: (8192, 0.8, 0.8),
            Family.CHATGLM3_32K: (32768, 0.8, 0.8),
            Family.GLM4: (8192, 0.8, 0.8),
            Family.TRANSFORMERS: (8192, 0.8, 0.8),
        }
        given = self.given(tiny, top_p=None)
        assert (given["do_sample"], given["top_p"], given["temperature"]) == (True, 0.8, 0.8)
        assert given["max_length"] == tiny[0].config.max_position_embeddings < 8192
        assert given["eos_token_id"] == [2]

    def test_temperature_of_nothing_takes_the_likeliest_token(self, tiny):
        model, tokenizer = tiny
        assert self.given(tiny, temperature=0)["do_sample"] is False
        assert "temperature" not in self.given(tiny, temperature=0.0)
        assert model.chat(tokenizer, "你好", temperature=0) == model.chat(tokenizer, "你好", **GREEDY)

    def test_what_is_given_wins(self, tiny):
        given = self.given(tiny, top_p=0.5, max_length=20)
        assert (given["top_p"], given["temperature"], given["max_length"]) == (0.5, 0.8, 20)
        greedy = self.given(tiny, do_sample=False)
        assert "top_p" not in greedy
        assert "max_length" not in self.given(tiny, max_new_tokens=3)

    def test_refusals(self, tiny):
        with pytest.raises(ConfigError, match=r"`max_length` is 20 tokens, but the conversation has 20"):
            self.given(tiny, prompt_length=20, max_length=20)
        with pytest.raises(ConfigError, match=r"eos_token_id='7'.*`chatglm2`.*model.generate"):
            self.given(tiny, eos_token_id=7)


def test_codegeex2_continues_one_text(tiny):
    model, _ = tiny
    tokenizer = load_tokenizer("glm-tiny", family="codegeex2")
    said = scripted(*tokenizer.text_ids("  return 1\n"), tokenizer.end_id)
    response, history = model.chat(tokenizer, "def one():", **said)
    assert history == [("def one():", response)]
    assert response.startswith(" "), "blanks are code"
    with pytest.raises(DataError, match="`codegeex2` continues one text"):
        model.chat(tokenizer, "def two():", history=history)


def test_repair_scores() -> None:
    nan, inf = torch.nan, torch.inf
    scores = torch.zeros(5, 8)
    scores[1, 2], scores[2, 2], scores[3] = nan, inf, -inf
    scores[4, 1:] = -inf
    repaired = RepairScores()(torch.zeros(5, 1, dtype=torch.long), scores)
    assert repaired.argmax(-1)[1:4].tolist() == [SAFE_TOKEN] * 3
    assert torch.isfinite(repaired[:4]).all()
    assert torch.equal(repaired[[0, 4]], scores[[0, 4]]), "banned tokens are no damage"


def test_chat_goes_on_with_damaged_logits(chatglm3) -> None:
    model, tokenizer = chatglm3

    class Damage(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores * torch.nan

    damage = LogitsProcessorList([Damage()])
    response, _ = model.chat(tokenizer, "?", logits_processor=damage, max_new_tokens=2)
    assert response == str(tokenizer.decode([SAFE_TOKEN] * 2)).strip()


def test_damaged_scores_are_said_once(caplog):
    repair = RepairScores()
    for _ in range(3):
        scores = repair(torch.ones(1, 4, dtype=torch.long), torch.full((1, 9), torch.nan))
        assert int(scores.argmax()) == SAFE_TOKEN
    assert [
        record.message for record in caplog.records if "no usable number at token 4" in record.message
    ] == [caplog.records[0].message]
    repair(torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 9))
    assert len(caplog.records) == 1
