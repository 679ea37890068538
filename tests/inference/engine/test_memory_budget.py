"""The memory for keys and values never exceeds the budget that is printed at the start, whatever comes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from glmtune.inference.engine.engine import Engine
from glmtune.inference.engine.states import batch_states
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from tests.inference.engine.cases import plain_generate
from tests.inference.engine.requests import add_adapters, alone, engine_of, finish, load


@pytest.fixture(scope="module")
def model() -> Any:
    return load("chatglm2")


def words(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(5, 40, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def taken(engine: Engine) -> int:
    """Count the columns in memory, tensor by tensor."""
    batch: Any = engine._open_batch
    banks = [bank for running in batch._running.values() for bank in running.states._banks]
    columns = sum(bank.layers[0][0].room[0] * bank.layers[0][0].room[1] for bank in banks)
    read = sum(row.layers[0][0].shape[2] for row in batch._reader.rows if row.layers)
    kept = sum(each.layers[0][0].shape[2] for each in batch._kept._kept) if batch._kept else 0
    return columns + read + kept


@pytest.mark.parametrize("bank_cost", [1.0, 1e9], ids=["many banks", "one bank"])
@pytest.mark.parametrize("reuses", [True, False])
def test_memory_keeps_to_the_budget(
    model: Any, reuses: bool, bank_cost: float, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of very unlike length share one bank on an accelerator: each would take what the longest takes."""
    monkeypatch.setattr(batch_states, "bank_cost", lambda *_: bank_cost)
    draw = random.Random(1)
    budget = 400
    engine = engine_of(
        model, max_batch_tokens=budget, reuse_caches=reuses, piece_tokens=16, prompt_lookup_tokens=5
    )
    add_adapters(engine, model, tmp_path)
    asked = []
    for number in range(40):
        adapter = draw.choice(["", "", "", "long", "lora-a"])
        prompt = words(draw.choice((3, 3, 5, 8, 60, 150)), number % 7)
        sampling = Sampling(max_new_tokens=draw.choice((2, 10, 40, 100)))
        request = Request(prompt_ids=prompt, sampling=sampling, adapter=adapter)
        asked.append((request, engine.submit(request)))
        for _ in range(draw.choice((0, 1, 4))):
            engine.step()
            assert taken(engine) <= budget
            assert engine.stats().allocated_tokens == taken(engine)
    most = together = 0
    while engine.step():
        most, together = max(most, taken(engine)), max(together, engine.stats().num_running)
        assert taken(engine) <= budget
    assert most > budget // 2
    assert together > 3
    for request, generation in asked:
        if not request.adapter:
            count = request.sampling.max_new_tokens
            expected = plain_generate(model, list(request.prompt_ids), (), count or 0)
            assert list(generation.result().token_ids) == expected


def test_one_long_row_among_short_ones_takes_no_more_than_they_need(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_states, "bank_cost", lambda *_: 1e9)
    engine = engine_of(model, max_batch_tokens=140)
    long = engine.submit(Request(prompt_ids=words(60, 0), sampling=Sampling(max_new_tokens=20)))
    short = [
        engine.submit(Request(prompt_ids=words(4, seed), sampling=Sampling(max_new_tokens=8)))
        for seed in (1, 2, 3, 4, 5)
    ]
    most = 0
    while engine.step():
        most = max(most, engine.stats().num_running)
        assert taken(engine) <= 140
    assert most == 6  # 80 and five times 12: all at once
    assert len(long.result().token_ids) == 20
    assert all(len(each.result().token_ids) == 8 for each in short)


@pytest.mark.parametrize("kv_cache", ["plain", "int8"])
def test_bytes_of_a_token_are_those_that_are_taken(model: Any, kv_cache: str) -> None:
    engine = engine_of(model, kv_cache=kv_cache)
    engine.submit(Request(prompt_ids=words(30, 0), sampling=Sampling(max_new_tokens=9)))
    engine.step()
    stats = engine.stats()
    batch: Any = engine._open_batch
    held = sum(running.states.held_bytes for running in batch._running.values())
    assert held == stats.allocated_tokens * stats.token_bytes > 0
    finish(engine)


def test_requests_that_come_together_read_what_they_share_once(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plain = engine_of(model), engine_of(model, reuse_caches=False)
    system = words(90, 0)
    requests = [
        Request(prompt_ids=(*system, *words(3 + seed % 5, seed)), sampling=Sampling(max_new_tokens=5))
        for seed in range(1, 17)
    ]
    expected = [alone(plain, request).token_ids for request in requests]
    read: list[int] = []
    model_type = type(engine._model)
    real = model_type.read

    def counted(self: Any, prompts: Any, before: Any, **how: Any) -> Any:
        read.extend(map(len, prompts))
        return real(self, prompts, before, **how)

    monkeypatch.setattr(model_type, "read", counted)
    generations = [engine.submit(request) for request in requests]
    finish(engine)
    own = sum(len(request.prompt_ids) for request in requests)
    common = [generation.num_cached_tokens for generation in generations]
    assert common[0] == 0
    assert all(count >= 90 for count in common[1:])
    assert sum(read) == own - sum(common) <= own - 15 * 90
    assert engine.stats().cached_prompt_tokens == sum(common)
    assert [generation.result().token_ids for generation in generations] == expected
    # One that comes while another runs, whose answer it goes on from.
    read.clear()
    first = engine.submit(Request(prompt_ids=words(80, 50), sampling=Sampling(max_new_tokens=40)))
    for _ in range(10):
        engine.step()
    prompt = (*words(80, 50), *words(4, 51))
    second = engine.submit(Request(prompt_ids=prompt, sampling=Sampling(max_new_tokens=5)))
    finish(engine)
    assert read == [80, 4]
    assert second.num_cached_tokens == 80
    assert list(second.result().token_ids) == plain_generate(model, list(prompt), (), 5)
    assert len(first.result().token_ids) == 40


def test_a_leader_that_is_cancelled_leaves_its_followers_to_read(model: Any) -> None:
    engine = engine_of(model, piece_tokens=16)
    engine.submit(Request(prompt_ids=words(5, 9), sampling=Sampling(max_new_tokens=60)))
    engine.step()
    system = words(100, 0)
    leader, follower = (
        engine.submit(Request(prompt_ids=(*system, seed), sampling=Sampling(max_new_tokens=4)))
        for seed in (7, 8)
    )
    for _ in range(3):
        engine.step()
    leader.cancel()
    finish(engine)
    assert leader.result().finish_reason == "cancelled"
    assert list(follower.result().token_ids) == plain_generate(model, [*system, 8], (), 4)


def test_the_stream_goes_on_while_an_adapter_is_read(
    model: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens come while the files of a LoRA are read: the engine's thread has no part in it."""
    from glmtune.inference.engine import adapters as held
    from tests.inference.engine.requests import write_lora

    folder = write_lora(model, tmp_path / "lora", seed=3)
    names = [name for name, _ in model.named_modules()]
    real = held.load_adapter
    seen: list[int] = []
    with engine_of(model) as engine:
        prompt = words(5, 1)
        stream = engine.submit(Request(prompt_ids=prompt, sampling=Sampling(max_new_tokens=120)))
        pieces = iter(stream)

        def slow(path: Any, tree: Any, **more: Any) -> Any:
            adapted = real(path, tree, **more)
            assert [name for name, _ in model.named_modules()] == names
            seen.extend(token for _ in range(40) for token in next(pieces).token_ids)
            return adapted

        monkeypatch.setattr(held, "load_adapter", slow)
        engine.add_adapter("lora", folder, kind="lora")
        assert len(seen) >= 40
        found = [*seen, *(token for piece in pieces for token in piece.token_ids)]
        assert found == plain_generate(model, list(prompt), (), 120)
        tuned = Request(prompt_ids=prompt, sampling=Sampling(max_new_tokens=8), adapter="lora")
        assert list(engine.submit(tuned).result().token_ids) != found[:8]
