"""Requests come, wait, are read in pieces, leave and fail; the engine's thread survives it all."""

from __future__ import annotations

import threading

import pytest
import torch

from glmtune.errors import ConfigError, DataError, GlmtuneError
from glmtune.inference.engine import model as engine_model
from glmtune.inference.engine.batching.continuous_batching import ContinuousBatch
from glmtune.inference.requests.engine_state import EngineBusyError, EngineClosedError
from glmtune.inference.requests.request import Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.models.chat.held import check_not_held
from tests.inference.engine.cases import plain_generate, plain_logits, shared_prompts
from tests.inference.engine.requests import alone, engine_of, finish, load


@pytest.fixture(scope="module")
def model():
    return load("chatglm2")


@pytest.fixture(scope="module")
def prompts(model):
    return [tuple(prompt) for prompt in shared_prompts(model.config)]


def words(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(5, 40, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def ask(prompt, count=8, **settings):
    fields = {key: settings.pop(key) for key in ("stop_ids", "text_stream") if key in settings}
    return Request(prompt_ids=tuple(prompt), sampling=Sampling(max_new_tokens=count, **settings), **fields)


# ---- reading


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(model, passes):
    engine = engine_of(model, piece_tokens=16)
    streaming = engine.submit(ask(words(6), 40))
    engine.step()
    passes.clear()
    long = engine.submit(ask(words(100, seed=1), 4))
    seen = []
    while engine.stats().num_running < 2 or not seen:
        engine.step()
        seen.append(list(passes))
        passes.clear()
    for _ in range(7):
        engine.step()
        seen.append(list(passes))
        passes.clear()
    pieces = [step[0] for step in seen if len(step) == 2]
    assert pieces == [(1, 16)] * 6 + [(1, 4)]
    assert all(step[-1][1] == 1 for step in seen)  # every one of these rounds had a step
    finish(engine)
    assert list(long.result().token_ids) == plain_generate(model, list(words(100, seed=1)), (), 4)
    assert list(streaming.result().token_ids) == plain_generate(model, list(words(6)), (), 40)


def test_short_prompts_are_read_together_and_do_not_wait_for_a_long_one(model, passes):
    engine = engine_of(model, piece_tokens=16)
    engine.submit(ask(words(6), 60))
    engine.step()
    passes.clear()
    engine.submit(ask(words(100, seed=1), 2))
    short = [engine.submit(ask(words(5, seed=seed), 2)) for seed in (2, 3, 4)]
    engine.step()
    engine.step()
    assert [size for size in passes if size[1] > 1] == [(1, 16), (3, 5)]
    engine.step()
    assert all(each.result().token_ids for each in short)
    finish(engine)


def test_chatglm_6b_reads_a_prompt_at_once(passes):
    model = load("chatglm")
    engine = engine_of(model, piece_tokens=4)
    prompt = (*words(30), model.config.gmask_token_id, model.config.bos_token_id)
    generation = engine.submit(ask(prompt, 4))
    finish(engine)
    assert passes[0] == (1, 32)
    assert list(generation.result().token_ids) == plain_generate(model, list(prompt), (), 4)


def test_log_probabilities_of_the_prompt_are_those_of_the_model(model):
    engine = engine_of(model, piece_tokens=7, read_tokens=7)
    prompt = words(33)
    for _ in range(2):  # also where its cache is held
        result = alone(engine, ask(prompt, 2, prompt_logprobs=2, logprobs=1))
        assert [entry.token_id for entry in result.prompt_logprobs] == list(prompt)
        assert result.prompt_logprobs[0].logprob is None
        with torch.no_grad():
            scores = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for place, entry in enumerate(result.prompt_logprobs[1:]):
            assert entry.logprob == pytest.approx(float(scores[place, prompt[place + 1]]), abs=1e-4)
            assert entry.top[0][0] == int(scores[place].argmax())
            assert len(entry.top) == 2
    first = result.logprobs[0]
    assert first.logprob == pytest.approx(
        float(plain_logits(model, list(prompt)).log_softmax(-1)[first.token_id]), abs=1e-4
    )


# ---- caches of finished requests


def test_a_finished_cache_is_used_again_and_changes_nothing(model, passes):
    engine, plain = engine_of(model), engine_of(model, reuse_caches=False)
    start = words(40)
    first = alone(engine, ask(start, 10))
    continued = ask((*start, *first.token_ids, *words(6, seed=1)), 10)
    branched = ask((*start[:30], *words(12, seed=2)), 10)
    for request, known in ((continued, 49), (branched, 30), (ask(start, 10), 39)):
        passes.clear()
        result = alone(engine, request)
        assert result.num_cached_tokens == known
        assert passes[0] == (1, len(request.prompt_ids) - known)
        assert result.token_ids == alone(plain, request).token_ids
    assert engine.stats().cached_prompt_tokens == 49 + 30 + 39
    assert plain.stats().cached_prompt_tokens == 0


def test_what_an_adapter_read_is_of_no_use_to_another(model, tmp_path):
    engine = engine_of(model, tmp_path)
    prompt = words(40)

    def cached(adapter: str, strength: float = 1.0) -> int:
        sampling = Sampling(max_new_tokens=3)
        request = Request(prompt_ids=prompt, sampling=sampling, adapter=adapter, strength=strength)
        return alone(engine, request).num_cached_tokens

    assert [cached("short"), cached("short", 0.5), cached("long"), cached("lora-a"), cached("")] == [0] * 5
    assert [cached("short"), cached("short", 0.5), cached("long"), cached("lora-a")] == [39] * 4
    assert cached("long", 0.0) == 39  # which is the base


def test_kept_caches_stay_below_the_budget_and_make_room(model):
    engine = engine_of(model, max_batch_tokens=150)
    for seed in range(6):
        alone(engine, ask(words(40, seed=seed), 10))
        assert engine.stats().kept_tokens <= 150
    assert engine.stats().kept_tokens == 3 * 49
    assert alone(engine, ask(words(40, seed=5), 3)).num_cached_tokens == 39
    assert alone(engine, ask(words(40, seed=0), 3)).num_cached_tokens == 0  # served nobody for longest
    large = engine.submit(ask(words(100, seed=9), 40))
    engine.step()
    assert engine.stats().kept_tokens <= 10
    finish(engine)
    assert len(large.result().token_ids) == 40


# ---- admission


def test_requests_are_admitted_in_order_by_all_they_may_hold(model):
    engine = engine_of(model, max_batch_tokens=100)
    sizes = [(20, 30), (10, 60), (5, 5), (5, 20)]  # the third would fit beside the first, but waits its turn
    generations = []
    for seed, (length, count) in enumerate(sizes):
        generations.append(engine.submit(ask(words(length, seed=seed), count)))
    seen = []
    while engine.step():
        stats = engine.stats()
        seen.append((stats.num_running, stats.num_waiting))
        assert stats.cache_tokens <= 100
    assert seen[0] == (1, 3)
    assert (3, 0) not in seen or seen.index((3, 0)) > 28
    for generation, (_, count) in zip(generations, sizes, strict=True):
        assert len(generation.result().token_ids) == count


def test_what_can_never_fit_is_refused_with_the_numbers(model):
    context = model.config.max_position_embeddings
    engine = engine_of(model, max_batch_tokens=64)
    with pytest.raises(
        ConfigError, match=r"prompt has 50 tokens and `max_new_tokens` is 20.* 64 tokens at most"
    ):
        engine.submit(ask(words(50), 20))
    with pytest.raises(
        ConfigError, match=rf"prompt has {context} tokens.*not set.*context is {context} tokens"
    ):
        engine.submit(Request(prompt_ids=words(context)))
    with pytest.raises(ConfigError, match=rf"`max_new_tokens` is {context}, but the model's context"):
        engine.submit(ask(words(3), context))
    with pytest.raises(ConfigError, match="no tokens"):
        engine.submit(ask((), 4))
    with pytest.raises(ConfigError, match=r"token id 9999999, but the model's ids go from 0 to \d+"):
        engine.submit(ask((5, 9999999), 4))
    with pytest.raises(ConfigError, match=r"`logit_bias` names the token -3, but the model has"):
        engine.submit(ask((5, 6), 4, logit_bias={-3: 1.0}))
    assert engine.stats().num_waiting == 0


def test_a_prefix_counts_among_what_must_fit(model, tmp_path):
    engine = engine_of(model, tmp_path, max_batch_tokens=64)
    request = Request(prompt_ids=words(50), sampling=Sampling(max_new_tokens=10), adapter="long")
    with pytest.raises(ConfigError, match=r"prefix has 9 tokens, the prompt has 50 .* is 10.* 64 tokens"):
        engine.submit(request)
    fitting = Request(prompt_ids=words(45), sampling=Sampling(max_new_tokens=10), adapter="long")
    assert len(alone(engine, fitting).token_ids) == 10


def test_without_a_limit_an_answer_ends_with_the_context_or_the_budget(model):
    context = model.config.max_position_embeddings
    prompt = words(context - 7)
    result = alone(engine_of(model), Request(prompt_ids=prompt))
    assert (len(result.token_ids), result.finish_reason) == (7, "length")
    result = alone(engine_of(model, max_batch_tokens=40), Request(prompt_ids=words(30)))
    assert (len(result.token_ids), result.finish_reason) == (10, "length")


def test_a_prompt_without_its_mask_token_fails_nobody_else():
    model = load("chatglm")
    engine = engine_of(model)
    with pytest.raises(DataError, match="has no sop"):
        engine.submit(ask(words(5), 4))


def test_a_full_queue_refuses(model):
    engine = engine_of(model, max_waiting=3)
    for seed in range(3):
        engine.submit(ask(words(5, seed=seed), 3))
    with pytest.raises(EngineBusyError, match=r"3 requests are waiting, .* at most 3"):
        engine.submit(ask(words(5), 3))
    engine.step()
    assert len(alone(engine, ask(words(5), 3)).token_ids) == 3


# ---- ends


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_a_cancelled_request_leaves_within_a_step(model, steps):
    engine = engine_of(model, piece_tokens=8)
    other = engine.submit(ask(words(5), 30))
    engine.step()
    generation = engine.submit(ask(words(40, seed=1), 30))
    for _ in range(steps):
        engine.step()
    generation.cancel()
    engine.step()
    assert engine.stats().num_running == 1
    assert engine.stats().num_waiting == 0
    assert generation.result().finish_reason == "cancelled"
    generation.cancel()  # again, and after the end: nothing happens
    finish(engine)
    assert list(other.result().token_ids) == plain_generate(model, list(words(5)), (), 30)


def test_closing_the_iteration_cancels(model):
    with engine_of(model) as engine:
        pieces = iter(engine.submit(ask(words(5), 50)))
        next(pieces)
        pieces.close()
        assert alone_in_thread(engine, ask(words(6), 5)).finish_reason == "length"
        assert engine.stats().num_running == 0


def alone_in_thread(engine, request):
    return engine.submit(request).result()


class Words:
    """A text stream that names tokens, stops at one and fails at another."""

    def __init__(self, stop: int = -1, fail: int = -1) -> None:
        self.is_stopped, self._stop, self._fail = False, stop, fail

    def feed(self, token_id):
        if token_id == self._fail:
            raise ValueError("no text for this")
        self.is_stopped = token_id == self._stop
        return "" if self.is_stopped else f"<{token_id}>"

    def finish(self):
        return "."


def test_text_comes_with_its_tokens_and_a_stop_text_ends_it(model, prompts):
    engine = engine_of(model)
    ids = alone(engine, ask(prompts[3], 8)).token_ids
    whole = alone(engine, ask(prompts[3], 8, text_stream=Words))
    assert whole.text == "".join(f"<{token}>" for token in ids) + "."
    stopped = alone(engine, ask(prompts[3], 8, text_stream=lambda: Words(stop=ids[2])))
    cut = ids.index(ids[2])
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", ids[: cut + 1])
    assert stopped.text == "".join(f"<{token}>" for token in ids[:cut])
    ended = alone(engine, ask(prompts[3], 8, text_stream=Words, stop_ids=frozenset({ids[2]})))
    assert (ended.finish_reason, ended.text) == ("eos", "".join(f"<{token}>" for token in ids[:cut]) + ".")
    ignored = alone(engine, ask(prompts[3], 8, stop_ids=frozenset({ids[2]}), ignore_eos=True))
    assert ignored.token_ids == ids


def test_an_error_of_one_request_is_its_own(model, prompts):
    engine = engine_of(model)
    ids = alone(engine, ask(prompts[3], 8)).token_ids
    bad = engine.submit(ask(prompts[3], 8, text_stream=lambda: Words(fail=ids[3])))
    good = engine.submit(ask(prompts[3], 8))

    def refuses(piece):
        raise RuntimeError("gone")

    engine.submit(ask(prompts[2], 8), refuses)
    finish(engine)
    with pytest.raises(GlmtuneError, match="no text for this"):
        bad.result()
    assert good.result().token_ids == ids
    assert engine.stats().num_running == 0


# ---- memory


@pytest.mark.parametrize("failing", [{3}, {6, 7}, {2}])
def test_nothing_is_lost_when_memory_runs_out(model, monkeypatch, failing):
    requests = [
        ask(words(12, seed=seed), 12, temperature=0.9 * (seed % 2), seed=seed, repetition_penalty=1.1)
        for seed in range(8)
    ]
    expected = [alone(engine_of(model), request).token_ids for request in requests]
    count, real = [0], engine_model.EngineModel._forward

    def forward(self, states, **inputs):
        count[0] += 1
        if count[0] in failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, states, **inputs)

    monkeypatch.setattr(engine_model.EngineModel, "_forward", forward)
    engine = engine_of(model, read_tokens=40)
    generations = [engine.submit(request) for request in requests]
    finish(engine)
    assert [generation.result().token_ids for generation in generations] == expected
    assert count[0] > max(failing)


def test_what_memory_never_suffices_for_fails_alone(model, monkeypatch):
    real = engine_model.EngineModel._forward

    def forward(self, states, **inputs):
        if inputs["input_ids"].shape[1] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, states, **inputs)

    engine = engine_of(model)
    monkeypatch.setattr(engine_model.EngineModel, "_forward", forward)
    large, small = engine.submit(ask(words(14), 4)), engine.submit(ask(words(5), 4))
    finish(engine)
    with pytest.raises(GlmtuneError, match="Memory does not suffice for one prompt of 14 tokens"):
        large.result()
    assert len(small.result().token_ids) == 4


# ---- the thread


def test_many_quick_requests_leave_nothing_behind(model):
    with engine_of(model, reuse_caches=False, batch_size=8) as engine:
        before = engine.stats()
        results = [None] * 200

        def client(start: int) -> None:
            for place in range(start, 200, 8):
                results[place] = engine.submit(ask(words(4 + place % 9, seed=place), 3)).result()

        threads = [threading.Thread(target=client, args=(start,)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
        assert all(len(result.token_ids) == 3 for result in results)
        assert (stats.num_running, stats.num_waiting, stats.kept_tokens) == (0, 0, 0)
        assert stats.cache_tokens == before.cache_tokens == 0
        assert stats.new_tokens == 600


def test_the_thread_survives_a_failing_request_and_a_failing_engine(model, monkeypatch):
    real = ContinuousBatch.step
    failures = [2]

    def step(self):
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("a mistake")
        return real(self)

    with engine_of(model) as engine:
        monkeypatch.setattr(ContinuousBatch, "step", step)
        for _ in range(2):
            with pytest.raises(GlmtuneError, match="a mistake"):
                engine.submit(ask(words(5), 4)).result()
        assert len(engine.submit(ask(words(5), 4)).result().token_ids) == 4


def test_a_pass_that_fails_fails_its_requests_with_the_reason(model, monkeypatch):
    real, failures = engine_model.EngineModel._forward, [1]

    def forward(self, states, **inputs):
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("shapes do not match")
        return real(self, states, **inputs)

    monkeypatch.setattr(engine_model.EngineModel, "_forward", forward)
    with engine_of(model) as engine:
        with pytest.raises(GlmtuneError, match="shapes do not match"):
            engine.submit(ask(words(5), 4)).result()
        assert len(engine.submit(ask(words(5), 4)).result().token_ids) == 4


def test_stopping_drains_or_cancels_and_refuses(model):
    engine = engine_of(model).start()
    drained = [engine.submit(ask(words(5, seed=seed), 20)) for seed in range(3)]
    engine.stop(drain=True)
    assert [each.result().finish_reason for each in drained] == ["length"] * 3
    with pytest.raises(EngineClosedError, match="takes no more requests"):
        engine.submit(ask(words(5), 3))
    engine.start()
    cancelled = engine.submit(ask(words(5), 100))
    next(iter(cancelled))
    engine.stop()
    assert cancelled.result().finish_reason == "cancelled"


def test_a_drain_that_takes_too_long_ends(model):
    engine = engine_of(model, batch_size=1).start()
    generations = [engine.submit(ask(words(5, seed=seed), 100)) for seed in range(40)]
    engine.stop(drain=True, timeout=0.05)
    reasons = [generation.result().finish_reason for generation in generations]
    assert set(reasons) <= {"length", "cancelled"}
    assert reasons[-1] == "cancelled"


def test_adapters_come_and_go_while_it_runs(model, tmp_path):
    from tests.inference.engine.requests import add_adapters

    with engine_of(model) as engine:
        running = engine.submit(ask(words(5), 100))
        add_adapters(engine, model, tmp_path)
        assert [info.name for info in engine.adapters] == [
            *("short", "long", "gated", "gated-b", "lora-a", "lora-b"),
        ]
        assert engine.adapters[1].num_tokens == 9
        sampling = Sampling(max_new_tokens=4)
        for name in ("short", "lora-b"):
            request = Request(prompt_ids=words(6), sampling=sampling, adapter=name)
            assert len(engine.submit(request).result().token_ids) == 4
            engine.remove_adapter(name)
        assert [info.name for info in engine.adapters] == ["long", "gated", "gated-b", "lora-a"]
        assert list(running.result().token_ids) == plain_generate(model, list(words(5)), (), 100)


def test_a_model_that_an_engine_runs_is_left_alone(model):
    check_not_held(model, "model.chat")
    with engine_of(model) as engine:
        with pytest.raises(ConfigError, match=r"`model\.chat` cannot run.*ChatEngine\.answer"):
            check_not_held(model, "model.chat")
        with pytest.raises(ConfigError, match="Another engine runs this model"):
            engine_of(model).start()
        with pytest.raises(ConfigError, match="runs already"):
            engine.start()
        with pytest.raises(ConfigError, match="alone touches the model"):
            list(engine.score_next([[5, 6]], [[7]]))
    check_not_held(model, "model.chat")
    assert len(list(engine.score_next([[5, 6]], [[7]]))) == 1
