"""Cases of adapters: each answers as if it were served alone, and one of another base ends the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from glmtune.inference.load_engine import load_engine
from glmtune.inference.requests.sampling import Sampling
from glmtune.loading import load_base
from glmtune.models.settings import ModelSettings
from glmtune.prefix.checkpoint import save_prefix
from glmtune.prefix.encoder import PrefixEncoder, prefix_shape
from tests.inference.engine.requests import load, write_lora
from tests.serving.service.served import CHAT, Served, serve

ADMIN_KEY = "admin-key-0123456789"
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
QUESTION = [{"role": "user", "content": "晚上睡不着应该怎么办？"}]
NUM_TOKENS = 12
Answer = tuple[str, list[float]]
"""Text and the log-probability of every token: two models that chance to say the same are still told apart."""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prefixes `a`, `b` and `c`, and the LoRA `lora`, for the embedded model."""
    folder = tmp_path_factory.mktemp("tuned")
    model = load_base("glm-tiny", dtype="float32", device="cpu")
    for seed, name in enumerate(("a", "b", "c")):
        torch.manual_seed(seed)
        encoder = PrefixEncoder(prefix_shape(model.config), pre_seq_len=4 + seed)
        with torch.no_grad():
            encoder.embedding.weight.mul_(3)  # as it is made at random it changes no token of the answer
        save_prefix(encoder, folder / name)
    write_lora(model, folder / "lora", seed=3)
    return folder


class Fresh:
    """Answers of engines that hold one adapter and answer one conversation."""

    def __init__(self, tuned: Path) -> None:
        self._tuned = tuned

    def answer(self, adapter: str, messages: list[dict[str, str]], strength: float = 1.0) -> Answer:
        """Load the model with one adapter (none: ``""``), ask once, and let go of it."""
        held = {adapter: self._tuned / adapter} if adapter else {}
        kinds = {"adapters" if adapter == "lora" else "prefixes": held}
        chat = load_engine(ModelSettings(source="glm-tiny", dtype="float32", device="cpu"), **kinds)  # type: ignore[arg-type]
        engine: Any = chat.engine
        with engine:
            ids = chat.prompt_ids(messages)
            sampling = Sampling(max_new_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
            answer = chat.submit(ids, sampling=sampling, adapter=adapter, strength=strength)
            events = list(answer)
        text = "".join(getattr(event, "text", "") for event in events)
        told = [entry.logprob for event in events for entry in getattr(event, "logprobs", ())]
        return text.strip(), told


@pytest.fixture(scope="module")
def fresh(tuned: Path) -> Fresh:
    return Fresh(tuned)


@pytest.fixture(scope="module")
def served_tuned(tuned: Path) -> Iterator[Served]:
    prefixes = f"prefix_path={{a:{tuned / 'a'},b:{tuned / 'b'}}}"
    words = [prefixes, f"adapter_path={{lora:{tuned / 'lora'}}}", "model.dtype=float32"]
    admin = ["access.admin=true", f"access.adapter_dir={tuned}"]
    with serve(*words, *admin, environment={"GLMTUNE_ADMIN_KEYS": ADMIN_KEY}) as server:
        yield server


def asked(served: Served, model: str, messages: list[dict[str, str]] = QUESTION, **more: Any) -> Any:
    body = {"model": model, "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0}
    reply = served.ask(CHAT, body | {"ignore_eos": True, "logprobs": True} | more)
    assert reply.status == 200, reply.body
    return reply.json


def answer_of(reply: Mapping[str, Any]) -> Answer:
    choice = reply["choices"][0]
    told = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    return choice["message"]["content"].strip(), told


def assert_same(found: Answer, expected: Answer) -> None:
    assert found[0] == expected[0]
    assert len(found[1]) == NUM_TOKENS
    assert found[1] == pytest.approx(expected[1], abs=1e-4)


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("glm-tiny", {}),
    "a": ("a", {}),
    "b": ("b", {}),
    "a at a half": ("a", {"prefix_strength": 0.5}),
    "lora": ("lora", {}),
}


def test_case_43_each_answers_as_if_served_alone(served_tuned: Served, fresh: Fresh) -> None:
    expected = {
        name: fresh.answer("" if model == "glm-tiny" else model, QUESTION, more.get("prefix_strength", 1.0))
        for name, (model, more) in ASKED.items()
    }
    # They differ, or the rest would show nothing.
    assert len({tuple(round(value, 3) for value in told) for _, told in expected.values()}) == len(ASKED)
    for _ in range(2):  # the second time with the caches of the first
        for name, (model, more) in ASKED.items():
            assert_same(answer_of(asked(served_tuned, model, **more)), expected[name])
    names = list(ASKED) * 3
    with ThreadPoolExecutor(len(names)) as pool:
        together = pool.map(lambda name: asked(served_tuned, ASKED[name][0], **ASKED[name][1]), names)
        for name, reply in zip(names, together, strict=True):
            assert_same(answer_of(reply), expected[name])


def test_case_43_what_was_replaced_under_its_name_is_read_anew(served_tuned: Served, fresh: Fresh) -> None:
    first = asked(served_tuned, "b")
    said = first["choices"][0]["message"]["content"]
    turns = [*QUESTION, {"role": "assistant", "content": said}, {"role": "user", "content": "你好"}]
    assert cached(asked(served_tuned, "b", turns)) > 0
    replaced = served_tuned.ask("/admin/adapters", {"name": "b", "path": "c", "replace": True}, **ADMIN)
    assert replaced.status == 201, replaced.body
    try:
        again = asked(served_tuned, "b", turns)
        assert cached(again) == 0
        assert_same(answer_of(again), fresh.answer("c", turns))
        assert_same(answer_of(asked(served_tuned, "b")), fresh.answer("c", QUESTION))
        # Its cache holds for the content, whatever the name.
        added = served_tuned.ask("/admin/adapters", {"name": "other", "path": "c"}, **ADMIN)
        assert added.status == 201
        other = asked(served_tuned, "other", turns)
        assert cached(other) > 0
        assert_same(answer_of(other), fresh.answer("c", turns))
    finally:
        body = {"name": "b", "path": "b", "replace": True}
        assert served_tuned.ask("/admin/adapters", body, **ADMIN).status == 201


def cached(reply: Mapping[str, Any]) -> int:
    return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("kind", ["prefix", "lora"])
def test_case_45_an_adapter_of_another_base_ends_the_start(kind: str, tmp_path: Path) -> None:
    other = load("chatglm2")  # two layers instead of six
    folder = tmp_path / "foreign"
    if kind == "prefix":
        save_prefix(PrefixEncoder(prefix_shape(other.config), pre_seq_len=4), folder)
    else:
        write_lora(other, folder, seed=1)
    name = {"prefix": "prefix_path", "lora": "adapter_path"}[kind]
    with serve(f"{name}={folder}", waits=False) as served:
        assert served.wait(120) == 1
    said = served.said()
    assert str(folder) in said
    assert "does not fit the model" in said
    assert "Load it with the base it was trained on." in said
    assert "Traceback" not in said
    assert "ready after" not in said
