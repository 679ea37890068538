"""The request engine: requests join and leave one batch at any step; evaluations use the same batch directly.

Driven by a thread of its own, which alone touches the model::

    with Engine(model) as engine:                      # starts the thread
        engine.add_adapter("tuned", "output/adgen")
        generation = engine.submit(Request(prompt_ids=ids, stop_ids=stop, adapter="tuned"))
        for piece in generation: ...

Or, without a thread, step by step by whoever calls `step`. `Engine.generate`, `Engine.complete` and
`Engine.score_next` work through many prompts in the calling thread: what prompts share is read once, and
prompts are batched by length under a token budget. Results do not depend on any of it (up to rounding).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Self, TypeVar

from transformers import PreTrainedModel

from glmtune.errors import ConfigError
from glmtune.inference.engine.adapters import (
    Held,
    adapter_of,
    beginning,
    hold_lora,
    hold_prefix,
    module_tree,
    no_such,
)
from glmtune.inference.engine.batching.continuous_batching import ContinuousBatch
from glmtune.inference.engine.batching.row import Row
from glmtune.inference.engine.budget import Budget, tokens_that_fit
from glmtune.inference.engine.many_prompts import (
    GeneratedIds,
    GeneratedText,
    complete,
    complete_texts,
    score_next_tokens,
)
from glmtune.inference.engine.model import Drafting, EngineModel
from glmtune.inference.engine.request_limits import most_new_tokens
from glmtune.inference.engine.stop_text import Decode, StopText
from glmtune.inference.requests.engine_state import (
    AdapterInfo,
    AdapterKind,
    EngineBusyError,
    EngineClosedError,
    EngineStats,
)
from glmtune.inference.requests.generation import Generation
from glmtune.inference.requests.request import Piece, Request
from glmtune.inference.requests.sampling import Sampling
from glmtune.inference.settings import EngineSettings
from glmtune.models.architectures.compiling import compile_parts
from glmtune.models.chat.held import check_not_held, hold_model, release_model

LOGGER = logging.getLogger(__name__)
_Found = TypeVar("_Found")

READ_TOKENS = {"cpu": 1024}
"""Prompt tokens per forward pass: more only drive a CPU's cache out (measured: 512 to 2048 are alike)."""
GPU_READ_TOKENS = 8192
"""Enough to keep a GPU busy; activations, which grow with it, stay small beside the weights."""
PIECE_TOKENS = {"cpu": 128}
"""Prompt tokens read between two steps while answers are streamed, which stall for as long."""
GPU_PIECE_TOKENS = 1024
"""Takes a GPU hardly longer than a step."""


class Engine:
    """Generation for requests that come and go, and next-token scores, with one model.

    Attributes:
        settings: how much is done at once.
        max_context_tokens: of the model: prompt and answer together.
    """

    def __init__(
        self, model: PreTrainedModel, settings: EngineSettings | None = None, draft: Drafting | None = None
    ) -> None:
        """Take a causal GLM (with prefix, LoRA or quantized layers as it is) and switch it to evaluation.

        Raises:
            ConfigError: it is to be compiled, and there is no compiler; ``draft`` has another vocabulary.
        """
        self.settings = settings or EngineSettings()
        if self.settings.compile:
            compile_parts(model)
        self._model = EngineModel(model)
        if draft is not None:
            self._model.use_drafts(draft)
        self.max_context_tokens: int = self._model.config.max_position_embeddings
        # What other threads hand over, under one lock, and the engine's thread takes between two steps.
        self._changed = threading.Condition()
        self._inbox: deque[Row] = deque()
        self._cancelled: list[Generation] = []
        self._errands: deque[Callable[[], None]] = deque()
        self._adapters: dict[str, Held] = {}
        self._thread: threading.Thread | None = None
        self._is_closed = self._is_stopping = self._drains = False
        # Touched by the engine's thread alone, or by whoever steps.
        self._rows: dict[Generation, Row] = {}
        self._num_submitted = 0
        self._open_batch: ContinuousBatch | None = None
        self._open_budget: Budget | None = None

    # ---- the thread

    def start(self) -> Self:
        """Start the thread that alone touches the model from now on; the cache budget is fixed here.

        Raises:
            ConfigError: it runs already, or another engine runs the model.
        """
        with self._changed:
            if self._thread is not None:
                raise ConfigError("The engine runs already. Start it once, or stop it first.")
            hold_model(self._model.base)
            self._open()
            self._is_closed = self._is_stopping = self._drains = False
            self._thread = threading.Thread(target=self._loop, name="glmtune-engine", daemon=True)
        self._thread.start()
        return self

    def stop(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """End the thread; requests that are not over are cancelled.

        Args:
            drain: let running and waiting requests finish first; new ones are refused meanwhile.
            timeout: seconds after which a drain ends all the same.
        """
        with self._changed:
            self._is_closed = True
            self._is_stopping, self._drains = True, drain
            self._changed.notify_all()
        thread = self._thread
        if thread is None:
            self._cancel_all()
            return
        thread.join(timeout if drain else None)
        if thread.is_alive():
            with self._changed:
                self._drains = False
                self._changed.notify_all()
            thread.join()
        self._thread = None
        release_model(self._model.base)

    def __enter__(self) -> Self:
        """Start."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def _loop(self) -> None:
        while self._wait_for_work():
            try:
                self.step()
            except Exception as error:  # a mistake of ours: nobody waits for ever because of it
                LOGGER.exception("The engine failed; its requests end, and it goes on with new ones.")
                self._begin_anew(error)
        self._cancel_all()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False: the thread is to end."""
        with self._changed:
            while True:
                if self._is_stopping and not (self._drains and self._has_work()):
                    return False
                if self._has_work():
                    return True
                self._changed.wait()

    def _has_work(self) -> bool:
        return bool(self._rows or self._inbox or self._cancelled or self._errands)

    # ---- requests

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Generation:
        """Ask for a continuation; from any thread.

        Args:
            request: what is asked.
            on_piece: takes the pieces instead of the returned handle's iteration; see `Generation`.

        Raises:
            ConfigError: it can never fit (with the numbers), or needs what the model has not.
            NoSuchAdapterError: no adapter of that name.
            EngineBusyError: the queue is full.
            EngineClosedError: the engine drains or was stopped.
        """
        with self._changed:
            if self._is_closed:
                raise EngineClosedError(
                    "The engine was stopped, or is about to stop: it takes no more requests."
                )
            batch = self._open()
            adapter = adapter_of(request, self._adapters, self._model)
            assert self._open_budget is not None
            limit = most_new_tokens(request, adapter, self._model, held_tokens=self._open_budget.held_tokens)
            waiting = len(self._inbox) + batch.num_waiting
            if waiting >= self.settings.max_waiting:
                raise EngineBusyError(
                    f"{waiting} requests are waiting, and the queue holds at most {self.settings.max_waiting}"
                    " (`engine.max_waiting`). Ask again later."
                )
            generation = Generation(request, cancel=self._cancel, on_piece=on_piece)
            self._num_submitted += 1
            begins = beginning(adapter, use_switch=request.use_switch)
            self._inbox.append(Row(self._num_submitted, request, limit, *begins, generation))
            self._changed.notify_all()
        return generation

    def step(self) -> bool:
        """Do what is to be done between two steps, and one step.

        For the engine's thread, or for whoever drives an engine that was not started.

        Returns:
            Whether something is left to do.
        """
        with self._changed:
            batch = self._open()
            errands, self._errands = list(self._errands), deque()
            cancelled, self._cancelled = self._cancelled, []
            new, self._inbox = list(self._inbox), deque()
            # In here, so that `submit` counts each waiting row once.
            batch.add(new)
        for row in new:
            assert row.generation is not None
            self._rows[row.generation] = row
        for errand in errands:
            errand()
        for generation in cancelled:
            if (row := self._rows.get(generation)) is not None:
                batch.end(row, "cancelled")
        for row in batch.step():
            assert row.generation is not None
            self._rows.pop(row.generation, None)
        return self._has_work()

    def stats(self) -> EngineStats:
        """Return what the engine does now; any thread may ask."""
        with self._changed:
            batch = self._open()
            assert self._open_budget is not None
            return EngineStats(
                num_running=batch.num_active,
                num_waiting=len(self._inbox) + batch.num_waiting,
                cache_tokens=batch.held_tokens,
                kept_tokens=batch.kept_tokens,
                cache_budget=self._open_budget.held_tokens,
                allocated_tokens=batch.allocated_tokens,
                token_bytes=self._open_budget.token_bytes,
                prompt_tokens=batch.num_prompt_tokens,
                cached_prompt_tokens=batch.num_cached_tokens,
                new_tokens=batch.num_new_tokens,
                switched=batch.switched,
                num_draft_tokens=batch.drafter.num_draft_tokens,
                num_accepted_tokens=batch.drafter.num_accepted_tokens,
            )

    def _cancel(self, generation: Generation) -> None:
        with self._changed:
            self._cancelled.append(generation)
            self._changed.notify_all()

    def _cancel_all(self) -> None:
        """End all requests that are not over, and whatever waits for the engine's thread."""
        with self._changed:
            batch, errands = self._open(), list(self._errands)
            batch.add(list(self._inbox))
            self._errands.clear()
            self._inbox.clear()
            self._cancelled.clear()
        for errand in errands:
            errand()
        for row in batch.rows:
            batch.end(row, "cancelled")
        self._rows.clear()

    def _begin_anew(self, error: Exception) -> None:
        """Fail every request and drop the batch, whose state cannot be trusted any more."""
        with self._changed:
            rows, self._rows, self._open_batch = list(self._rows.values()), {}, None
        for row in rows:
            if row.finish_reason is None:
                row.give(Piece(finish_reason="failed", error=str(error) or type(error).__name__))

    def _open(self) -> ContinuousBatch:
        """Return the batch of requests, made where there is none."""
        if self._open_batch is None:
            self._open_budget = self._open_budget or self._budget()
            device = self._model.device.type
            self._open_batch = ContinuousBatch(
                self._model,
                self._open_budget,
                kv_cache=self.settings.kv_cache,
                piece_tokens=self.settings.piece_tokens or PIECE_TOKENS.get(device, GPU_PIECE_TOKENS),
                reuses_caches=self.settings.reuse_caches,
                prompt_lookup_tokens=self.settings.prompt_lookup_tokens,
            )
        return self._open_batch

    # ---- adapters

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters held, in the order in which they were added."""
        with self._changed:
            return tuple(held.info for held in self._adapters.values())

    def add_adapter(
        self,
        name: str,
        path: str | Path,
        *,
        kind: AdapterKind = "prefix",
        replace: bool = False,
        use_switch: bool = True,
    ) -> AdapterInfo:
        """Read a prefix or LoRA and hold it under a name; safe while requests run, which go on meanwhile.

        It is read and checked in the calling thread. Of the engine's thread only a moment between two steps
        is taken, to see the model's layers as they are without a LoRA.

        Args:
            name: how requests will name it.
            path: where it was saved: a file, its folder, or a training run's folder.
            kind: which of the two it is.
            replace: take the place of one of that name; requests that run with that finish with it.
            use_switch: obey its switch, if it has one: requests that it decides against run as the base.

        Raises:
            CheckpointError: it cannot be read or does not belong to the model, with file and reason.
            ConfigError: the name is empty or taken, or the model carries an adapter itself.
            EngineClosedError: the engine stopped meanwhile.
        """
        hold = {"prefix": hold_prefix, "lora": hold_lora}[kind]
        self._check_name(name, replace=replace)
        tree = self._in_thread(lambda: module_tree(self._model.base))
        held = hold(self._model, tree, name, path, use_switch=use_switch)
        with self._changed:
            self._check_name(name, replace=replace)  # another thread may have been quicker
            self._adapters[name] = held
        return held.info

    def _check_name(self, name: str, *, replace: bool) -> None:
        if not name or (name in self._adapters and not replace):
            what = f"`{name}` is the name of an adapter already" if name else "An adapter has no name"
            raise ConfigError(f"{what}. Give it another one, or remove that adapter first.")

    def remove_adapter(self, name: str) -> None:
        """Let go of an adapter; requests that run or wait with it finish.

        Raises:
            NoSuchAdapterError: there is none of that name.
        """
        with self._changed:
            if name not in self._adapters:
                raise no_such(name, self._adapters)
            del self._adapters[name]

    def _in_thread(self, compute: Callable[[], _Found]) -> _Found:
        """Compute between two steps in the thread that touches the model; here, where there is none."""
        future: Future[_Found] = Future()

        def errand() -> None:
            try:
                future.set_result(compute())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            thread = self._thread
            if thread is not None:
                if self._is_stopping:
                    raise EngineClosedError("The engine is about to stop.")
                self._errands.append(errand)
                self._changed.notify_all()
        if thread is None or thread is threading.current_thread():
            errand()
        return future.result()

    # ---- evaluations

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        decode: Decode,
        stop: Sequence[str] = (),
        samplings: Sequence[Sampling] = (),
    ) -> Iterator[GeneratedText]:
        """Complete prompts in the calling thread, greedily unless told otherwise.

        Args:
            prompts: token ids, none empty.
            max_new_tokens: most tokens of a completion, the end token included.
            stop_ids: tokens that end a completion.
            decode: turns generated ids into text.
            stop: strings that end a completion.
            samplings: how the tokens of each prompt are chosen; their lengths and stop texts do not count.

        Yields:
            One completion per prompt, as they finish.

        Raises:
            ConfigError: a prompt and its completion may not fit the model's context; an engine's thread
                runs the model.
            GlmtuneError: memory does not suffice even for one row.
        """
        self._check_free()
        yield from complete_texts(
            self._model,
            self.settings,
            self._budget(),
            prompts,
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset(stop_ids),
            stop_text=StopText(decode, stop),
            samplings=samplings,
        )

    def complete(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], *, stop_ids: Sequence[int]
    ) -> Iterator[GeneratedIds]:
        """Complete prompts in the calling thread, each by its own settings.

        Args:
            prompts: token ids, none empty.
            samplings: how the tokens of each prompt are chosen; no text is looked at, so stop texts count
                for nothing, and log-probabilities are not handed out.
            stop_ids: tokens that end a completion.

        Yields:
            One completion per prompt, as they finish.

        Raises:
            ConfigError: a prompt and its completion may not fit the model's context; an engine's thread
                runs the model.
            GlmtuneError: memory does not suffice even for one row; the model's output is not finite.
        """
        self._check_free()
        ends = frozenset(stop_ids)
        requests = [
            Request(prompt_ids=tuple(prompt), sampling=sampling, stop_ids=ends)
            for prompt, sampling in zip(prompts, samplings, strict=True)
        ]
        yield from complete(self._model, self.settings, self._budget(), requests)

    def score_next(
        self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Return the log-probabilities of a few next tokens over the whole vocabulary.

        Args:
            prompts: token ids, none empty.
            candidates: per prompt the ids asked for.

        Yields:
            Place of the prompt and the natural log-probability of each candidate, a batch at a time.

        Raises:
            ConfigError: a prompt does not fit the model's context; an engine's thread runs the model.
            GlmtuneError: memory does not suffice even for one prompt.
        """
        self._check_free()
        yield from score_next_tokens(self._model, self.settings, self._budget(), prompts, candidates)

    def _budget(self) -> Budget:
        model = self._model
        token_bytes = model.token_bytes(self.settings.kv_cache)
        room = tokens_that_fit(token_bytes, model.layer_devices)
        return Budget(
            rows=self.settings.batch_size,
            held_tokens=min(room, self.settings.max_batch_tokens),
            read_tokens=self.settings.read_tokens or READ_TOKENS.get(model.device.type, GPU_READ_TOKENS),
            token_bytes=token_bytes,
        )

    def _check_free(self) -> None:
        if self._thread is not None:
            raise ConfigError(
                "The engine's thread runs, and it alone touches the model: `generate`, `complete` and"
                " `score_next` work in the calling thread. Use `submit`, or call `stop` first."
            )
        check_not_held(self._model.base, "Engine.generate")
