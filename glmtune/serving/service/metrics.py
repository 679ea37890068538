"""What Prometheus is told. Names are stable: dashboards break where one changes, so a test holds them.

Names have no colons (those are for rules), times are in seconds, counters end in ``_total``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from glmtune.inference.requests.engine_state import EngineStats
from glmtune.serving.api.state import AnsweredRequest, ServingState
from glmtune.serving.service.phases import phase
from glmtune.version import __version__

ANSWER_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5)


class EngineCollector(Collector):
    """Asks the engine when Prometheus asks: nothing has to be kept in step."""

    def __init__(self, state: ServingState) -> None:
        """Take the state of the server."""
        self._state = state

    def describe(self) -> list[Metric]:
        """Return nothing: what is registered is not collected at once, while there is no model."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield what the engine does and did."""
        stats, adapters = EngineStats(0, 0, 0, 0, 0, 0, 0, 0), ()
        if self._state.chat is not None:
            engine: Any = self._state.chat.engine
            stats, adapters = engine.stats(), engine.adapters
        for name, text, value in (
            ("requests_running", "Requests whose prompt is read or being read.", stats.num_running),
            ("requests_waiting", "Requests in the queue of the engine.", stats.num_waiting),
            ("cache_tokens", "Tokens whose keys and values are held for requests.", stats.cache_tokens),
            ("cache_kept_tokens", "Tokens of finished requests, held to be used again.", stats.kept_tokens),
            ("cache_budget_tokens", "Most tokens that are ever held.", stats.cache_budget),
            ("ready", "1 while requests are taken, else 0.", phase(self._state) == "ready"),
        ):
            yield GaugeMetricFamily(f"glmtune_{name}", text, value=float(value))
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            (
                "prompt_cached_tokens",
                "Tokens of prompts that were not read, as they were held.",
                stats.cached_prompt_tokens,
            ),
            ("generated_tokens", "Tokens generated.", stats.new_tokens),
            ("draft_tokens", "Tokens drafted, by lookup or a model.", stats.num_draft_tokens),
            ("accepted_draft_tokens", "Drafted tokens that were right.", stats.num_accepted_tokens),
        ):
            yield CounterMetricFamily(f"glmtune_{name}", text, value=value)
        switched = CounterMetricFamily(
            "glmtune_switch",
            "Requests whose adapter has a switch, by what it decided.",
            labels=["adapter", "decision"],
        )
        for name, counts in stats.switched.items():
            for decision, count in zip(("on", "off"), counts, strict=True):
                switched.add_metric([name, decision], count)
        yield switched
        loaded = GaugeMetricFamily("glmtune_adapters", "Adapters that can be asked for.", labels=["kind"])
        for kind in ("prefix", "lora"):
            loaded.add_metric([kind], sum(info.kind == kind for info in adapters))
        yield loaded


class Metrics:
    """Everything that is counted, in a registry of its own.

    Attributes:
        requests: by route, method and status.
        request_seconds: by route, from the head of a request to the last byte of its reply.
        first_token_seconds: from the submission of a prompt to its first token.
        token_seconds: mean time of a token after the first, one value per answer.
    """

    def __init__(self, state: ServingState) -> None:
        """Begin at zero."""
        disable_created_metrics()  # a second series beside each, with the time of its first value
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "glmtune_http_requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "glmtune_http_request_seconds",
            "Time of a request, from its head to the last byte of its reply.",
            ["route"],
            buckets=ANSWER_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "glmtune_time_to_first_token_seconds",
            "Time from the submission of a prompt to its first token, waiting included.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "glmtune_time_per_output_token_seconds",
            "Mean time of a token after the first, one value per answer.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        build = Gauge(
            "glmtune_build_info",
            "Always 1; what runs is in its labels.",
            ["version", "model"],
            registry=registry,
        )
        build.labels(__version__, state.names[0]).set(1)
        registry.register(EngineCollector(state))
        ProcessCollector(registry=registry)

    def note_answered(self, answered: AnsweredRequest) -> None:
        """Count what the engine did for a request."""
        first, num_later = answered.first_seconds, answered.num_new_tokens - answered.num_choices
        if first is not None:
            self.first_token_seconds.observe(first)
            if num_later > 0:  # choices run side by side, and each has a first token
                each = num_later / answered.num_choices
                self.token_seconds.observe((answered.seconds - first) / each)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)
