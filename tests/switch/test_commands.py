"""Commands over what has a switch: they obey it, say so, and let it be ignored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.compare.settings import SideSettings
from glmtune.cli import main
from glmtune.errors import ConfigError
from glmtune.inference.requests.chat import AnswerEvent, Finished, TextDelta
from glmtune.interactive.conversation import AnswerParts
from glmtune.interactive.terminal_chat.display import Display
from glmtune.interactive.web.shown import with_ending
from glmtune.interactive.web.words import CHINESE, ENGLISH
from glmtune.loading import load_tokenizer
from glmtune.messages import Message
from glmtune.models.load import load_official
from glmtune.models.templates.renderer import template_for
from glmtune.prefix.checkpoint import load_prefix, save_prefix
from glmtune.switch.rule import Switch
from tests.interactive.tuned import write_tuned as tuned_by_chance
from tests.serving.service.served import CHAT, LONG, serve
from tests.switch.cases import FACTS, dividing_switch, last_hidden, write_tuned

CONTENTS = [f"类型#裙*颜色#{color}*面料#{cloth}" for color in "白红" for cloth in ("棉", "丝", "柔软")]
PATH = {"prefix": "prefix_path", "lora": "adapter_path"}


def never(model: Any) -> Switch:
    """A rule that leaves every prompt to the base."""
    return Switch(torch.zeros(model.config.hidden_size), -1.0, FACTS)


def predictions(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return sorted((json.loads(line) for line in lines if line), key=lambda row: row["row"])


@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_predict(kind: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each row is the base's or the tuned model's, as the rule says; how many are off is said and written."""
    model = load_official(tiny_base, device="cpu")
    tokenizer: Any = load_tokenizer(tiny_base)
    template = template_for(tokenizer)
    prompts = [template.encode_prompt(tokenizer, [Message("user", text)]) for text in CONTENTS]
    switch = dividing_switch(model, prompts)
    decided = switch.decide(last_hidden(model, prompts)).tolist()
    assert 0 < sum(decided) < len(decided)
    tuned = write_tuned(model, tmp_path / "tuned", kind, switch)
    data = tmp_path / "dev.jsonl"
    rows = [{"content": text, "summary": "很白。"} for text in CONTENTS]
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    common = [f"model.source={tiny_base}", "model.dtype=float32", "data=files", "data.layout=adgen"]
    common += [f"data.test_file={data}", "generation.max_new_tokens=8", "data.max_source_length=64"]

    def predict(name: str, *words: str) -> list[dict[str, Any]]:
        assert main(["predict", *common, *words, f"output_dir={tmp_path / name}"]) == 0
        return predictions(tmp_path / name)

    base = predict("base")
    assert "switch:" not in capsys.readouterr().out
    always = predict("always", f"{PATH[kind]}={tuned}", "use_switch=false")
    said = capsys.readouterr().out
    assert "switch:" not in said
    obeyed = predict("obeyed", f"{PATH[kind]}={tuned}")
    said = capsys.readouterr().out
    off = decided.count(False)
    assert f"switch: off for {off} of {len(decided)} prompts" in said
    assert ", with its switch" in said
    results = json.loads((tmp_path / "obeyed" / "predict_results.json").read_text(encoding="utf-8"))
    assert results["num_switched_off"] == off
    assert [row["prediction"] for row in obeyed] == [
        (always if is_on else base)[place]["prediction"] for place, is_on in enumerate(decided)
    ]
    assert [row["prediction"] for row in always] != [row["prediction"] for row in base]
    mixed = [*common, f"{PATH[kind]}={tuned}", "use_switch=false", f"output_dir={tmp_path / 'obeyed'}"]
    capsys.readouterr()
    assert main(["predict", *mixed]) == 2
    assert "use_switch" in capsys.readouterr().err


def test_eval_and_compare(tiny_base: Path, tmp_path: Path) -> None:
    tuned = write_tuned(
        model := load_official(tiny_base, device="cpu"), tmp_path / "tuned", "prefix", never(model)
    )
    model_words = [f"model.source={tiny_base}", "model.dtype=float32"]
    asked = ["benchmark=ceval", "benchmark.data_dir=sample", "benchmark.limit=1", "protocol=few_shot_direct"]

    def evaluated(name: str, *words: str) -> list[Any]:
        assert main(["eval", *model_words, *asked, *words, f"output_dir={tmp_path / name}"]) == 0
        lines = (tmp_path / name / "answers.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line][1:]
        return [{key: value for key, value in row.items() if key != "checksum"} for row in rows]

    base = evaluated("base")
    assert base
    assert evaluated("off", f"prefix_path={tuned}") == base
    assert evaluated("on", f"prefix_path={tuned}", "use_switch=false") != base

    def drop(*words: str) -> dict[str, Any]:
        side = [f"candidate.prefix_path={tuned}", *words, "gate.num_resamples=100"]
        folder = tmp_path / f"compared{len(words)}"
        code = main(["compare", *model_words, *asked, *side, f"output_dir={folder}"])
        assert code in (0, 3, 4)
        return json.loads((folder / "compare.json").read_text(encoding="utf-8"))["benchmarks"]["ceval"]

    assert drop()["sensitivity"]["choices"]["js_nats"]["mean"] == 0
    assert drop("candidate.use_switch=false")["sensitivity"]["choices"]["js_nats"]["mean"] > 0


def test_nothing_tuned_has_no_switch_to_ignore() -> None:
    with pytest.raises(ConfigError, match="`use_switch` is False on a side where nothing that was tuned"):
        SideSettings(use_switch=False)
    assert not SideSettings(prefix_path="runs/ads", use_switch=False).use_switch


def test_a_server(tmp_path: Path) -> None:
    """Its list of models, the usage of a reply and /metrics tell of it; `glmtune chat` shows what the reply says."""
    model = load_official("glm-tiny", dtype="float32", device="cpu")
    shop = tuned_by_chance(tmp_path).prefix
    ads = save_prefix(load_prefix(shop, model), tmp_path / "with", switch=never(model))
    always = Switch(torch.zeros(model.config.hidden_size), 1.0, FACTS)
    low = write_tuned(model, tmp_path / "low", "lora", always)
    words = (f"prefix_path={{ads:{ads},shop:{shop}}}", f"adapter_path={{low:{low}}}", "model.dtype=float32")
    asking = LONG | {"max_tokens": 12}
    with serve(*words) as served:
        card = served.ask("/v1/models/ads").json
        assert card["switch"] == {**dataclasses.asdict(FACTS), "num_on": 0, "num_off": 0}
        assert "switch" not in served.ask("/v1/models/shop").json
        asked = {
            name: served.ask(CHAT, {**asking, "model": name}).json
            for name in ("glm-tiny", "ads", "shop", "low")
        }
        said = {name: reply["choices"][0]["message"]["content"] for name, reply in asked.items()}
        assert said["ads"] == said["glm-tiny"] != said["shop"]
        assert asked["ads"]["usage"]["switch"] == "off"
        assert asked["low"]["usage"]["switch"] == "on"
        assert not any("switch" in asked[name]["usage"] for name in ("glm-tiny", "shop"))
        assert served.ask("/v1/models/ads").json["switch"]["num_off"] == 1
        for name, decision in (("ads", "off"), ("low", "on")):
            labels = f'{{adapter="{name}",decision="{decision}"}}'
            assert served.metric(f"glmtune_switch_total{labels}") == 1
    with serve(f"prefix_path={{ads:{ads}}}", "model.dtype=float32", "use_switch=false") as served:
        reply = served.ask(CHAT, {**asking, "model": "ads"}).json
        assert reply["choices"][0]["message"]["content"] == said["shop"], "the same prefix, obeying nothing"
        assert "switch" not in reply["usage"]
        assert "switch" not in served.ask("/v1/models/ads").json


@pytest.mark.parametrize(("is_tuned", "word"), [(True, ", tuned]"), (False, ", base]"), (None, "[1 tokens]")])
def test_the_terminal_says_who_answered(
    is_tuned: bool | None, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[AnswerEvent] = [TextDelta("好"), Finished("stop", 3, 1, 0, is_tuned=is_tuned)]
    Display(clock=lambda: 0.0).answer(events, AnswerParts())
    assert capsys.readouterr().out.strip().endswith(word)


@pytest.mark.parametrize("words", [ENGLISH, CHINESE])
def test_the_page_says_where_the_base_answered(words: Any) -> None:
    for is_tuned in (True, False, None):
        answer = AnswerParts(text="好", finished=Finished("stop", 3, 1, 0, is_tuned=is_tuned))
        [message] = with_ending([{"role": "assistant", "content": "好"}], answer, words)
        assert (words.switched_off in message["content"]) == (is_tuned is False)
