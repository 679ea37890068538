"""Drafts by lookup and by a model, in commands beside chat, serve and predict: the same answers, and they are used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.backends import glm
from glmtune.cli import main
from glmtune.errors import ConfigError
from glmtune.inference.engine.batching import drafting
from glmtune.inference.requests.answer_events import TextDelta
from glmtune.inference.settings import DraftSettings, EngineSettings
from glmtune.models.settings import ModelSettings
from recipes.compare import CompareConfig
from recipes.web import WebConfig, _answerer

ASK = ("benchmark=gsm8k", "benchmark.data_dir=sample", "benchmark.limit=2", "benchmark.max_new_tokens=24",
       "num_threads=1", "model.dtype=float32")  # fmt: skip
WAYS = {
    "model": ("draft.source=glm-tiny", "draft.quantization=int4"),
    "lookup": ("engine.prompt_lookup_tokens=7",),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(drafting.TOKEN_COST, "cpu", 0.0)
    for name in ("GLMTUNE_DATA", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens drafted by each engine of an evaluation."""
    counts: list[int] = []
    engine_for = glm.engine_for

    def noted(*given: Any) -> Any:
        engine: Any = costless(engine_for(*given))
        number, generate = len(counts), engine.generate
        counts.append(0)

        def counted(*prompts: Any, **options: Any) -> Iterator[Any]:
            for made in generate(*prompts, **options):
                counts[number] += made.num_draft_tokens
                yield made

        engine.generate = counted
        return engine

    monkeypatch.setattr(glm, "engine_for", noted)
    return counts


def costless(engine: Any) -> Any:
    """Let the model that drafts cost nothing: it is as large as the other here, so it would never be asked."""
    if engine._model.draft_model is not None:
        engine._model.draft_model = dataclasses.replace(engine._model.draft_model, cost=0.0)
    return engine


def answers(folder: str) -> bytes:
    return Path(folder, "answers.jsonl").read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_evaluations_that_draw_their_answers(way: str, drafted: list[int]) -> None:
    words = (*ASK, "samples=2", "sampling.temperature=0.7")
    assert main(["eval", *words, "output_dir=plain"]) == 0
    assert main(["eval", *words, *WAYS[way], "output_dir=drafted"]) == 0
    assert answers("drafted") == answers("plain")
    before, after = (sum(part) for part in (drafted[: len(drafted) // 2], drafted[len(drafted) // 2 :]))
    assert before == 0 < after


@pytest.mark.parametrize("way", WAYS)
def test_every_checkpoint_is_drafted_for(way: str, drafted: list[int]) -> None:
    from glmtune.models.load import load_official
    from glmtune.prefix.checkpoint import PrefixMeta, save_prefix
    from glmtune.prefix.encoder import PrefixEncoder, prefix_shape

    torch.manual_seed(0)
    model = load_official("glm-tiny")
    encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=2)
    save_prefix(encoder, Path("run/checkpoint-5"), meta=PrefixMeta(base_fingerprint=model.fingerprint()))
    assert main(["eval", *ASK, "checkpoints=run", "output_dir=plain"]) == 0
    assert main(["eval", *ASK, *WAYS[way], "checkpoints=run", "output_dir=drafted"]) == 0
    for step in ("step-0", "step-5"):
        assert answers(f"drafted/{step}") == answers(f"plain/{step}")
    assert drafted[:2] == [0, 0]
    assert min(drafted[2:]) > 0


@pytest.mark.parametrize("way", WAYS)
def test_both_sides_of_a_comparison(way: str, drafted: list[int]) -> None:
    words = (*ASK, "candidate.quantization=int8", "gate.num_resamples=200")
    figures = {}
    for name, more in (("plain", ()), ("drafted", WAYS[way])):
        assert main(["compare", *words, *more, "resume=false", f"output_dir={name}"]) in (0, 3, 4)
        values = json.loads(Path(name, "compare.json").read_text(encoding="utf-8"))
        figures[name] = values["benchmarks"]["gsm8k"]["verdict"]
    assert figures["drafted"] == figures["plain"]
    assert drafted[:2] == [0, 0]
    assert min(drafted[2:]) > 0


def test_finished_runs_are_not_drafted_for() -> None:
    with pytest.raises(ConfigError, match=r"`draft` is set beside `runs`"):
        CompareConfig(runs=["a", "b"], draft=DraftSettings(source="glm-tiny"))


@pytest.mark.parametrize("way", WAYS)
def test_the_page_answers_with_them(way: str) -> None:
    said, counts = [], []
    for settings in (
        {},
        {
            "model": {"draft": DraftSettings(source="glm-tiny", quantization="int4")},
            "lookup": {"engine": EngineSettings(prompt_lookup_tokens=7)},
        }[way],
    ):
        answerer: Any = _answerer(WebConfig(model=ModelSettings(dtype="float32", device="cpu"), **settings))
        try:
            costless(answerer._engine)
            question = [{"role": "user", "content": "Say: one two three one two three one two three"}]
            stream = answerer.answer(question, sampling={"temperature": 0, "max_new_tokens": 24})
            said.append("".join(event.text for event in stream if isinstance(event, TextDelta)))
            counts.append(answerer._engine.stats().num_draft_tokens)
        finally:
            answerer.close()
    assert said[0]
    assert said[0] == said[1]
    assert counts[0] == 0 < counts[1]


def test_a_server_behind_the_page_has_its_own() -> None:
    for name, value in {
        "draft": DraftSettings(source="glm-tiny"),
        "engine": EngineSettings(prompt_lookup_tokens=7),
    }.items():
        with pytest.raises(ConfigError, match=rf"`url` names a server, .* but `{name}` has settings"):
            WebConfig(url="http://127.0.0.1:1", **{name: value})
