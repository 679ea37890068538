"""Serve a model, and what was tuned on it, to clients of OpenAI's interface: `glmtune serve`."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtune.errors import ConfigError
from glmtune.inference.settings import DraftSettings, EngineSettings
from glmtune.models.settings import ModelSettings
from glmtune.serving.settings import (
    ADMIN_KEYS_VARIABLE,
    KEYS_VARIABLE,
    MIN_ADMIN_KEY,
    AccessSettings,
    AnswerSettings,
    LimitSettings,
)
from glmtune.settings import check_range, setting
from recipes.words.compose import Command

if TYPE_CHECKING:
    from glmtune.inference.requests.chat import ChatEngine
    from glmtune.terminal.console import Console


@dataclass(frozen=True)
class ServeConfig:
    """What to serve, where, to whom, and how much of it."""

    model: ModelSettings = setting(ModelSettings, "the base model")
    engine: EngineSettings = setting(EngineSettings, "how it computes")
    draft: DraftSettings = setting(DraftSettings, "a smaller model that drafts tokens for it")
    prefix_path: dict[str, str] | list[str] | str | None = setting(
        None, "tuned prefixes: a run, several [A,B], or with names {style:runs/a,polite:runs/b}"
    )
    adapter_path: dict[str, str] | list[str] | str | None = setting(None, "LoRA adapters, in the same forms")
    use_switch: bool = setting(
        True, "obey the switch of what was tuned, if it has one; false: it applies to every prompt"
    )
    model_names: list[str] | None = setting(None, "names of the base for clients; default: the model's own")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all networks (use keys then)")
    port: int = setting(8000, "port to listen on; 0 takes a free one")
    access: AccessSettings = setting(AccessSettings, "who may use it")
    limits: LimitSettings = setting(LimitSettings, "how much it takes on")
    answers: AnswerSettings = setting(AnswerSettings, "what an answer is where a request says nothing")

    def __post_init__(self) -> None:
        """Check what needs no file.

        Raises:
            ConfigError: no such port, or no host.
        """
        check_range("port", self.port, low=0, high=65535)
        if not self.host.strip():
            raise ConfigError(
                "`host` is empty, but it must be an address. Use 127.0.0.1, or 0.0.0.0 for all."
            )


def run(config: ServeConfig) -> None:
    """Listen, load, serve, and end when a signal asks for it.

    Raises:
        GlmtuneError: a setting cannot be obeyed, or the model or an adapter cannot be loaded.
    """
    from glmtune.inference.adapter_names import tuned_paths
    from glmtune.listening import is_loopback, listen, url_of
    from glmtune.serving.api.state import ServingState
    from glmtune.serving.app import access_rules, create_app
    from glmtune.serving.keys import read_keys
    from glmtune.serving.run import run_server
    from glmtune.serving.served_names import base_names, default_model
    from glmtune.serving.service.request_log import start_logging
    from glmtune.terminal.console import Console

    console, begin = Console(), time.monotonic()
    prefixes, adapters = tuned_paths(config.prefix_path, config.adapter_path)
    names = base_names(config.model.source, config.model_names, [*prefixes, *adapters])
    keys = read_keys("access.api_keys_file", config.access.api_keys_file, KEYS_VARIABLE)
    admin_keys = _admin_keys(config.access)
    # Before the model: a port that is taken is known at once, and `/health` answers while the model loads.
    sockets = listen(config.host, config.port)
    url = url_of(sockets, config.host)
    state = ServingState(
        names=names,
        default_model=default_model(config.answers.default_model, names, [*prefixes, *adapters]),
        max_tokens=config.answers.max_tokens,
        is_strict=config.answers.strict,
    )
    rules = access_rules(
        config.access, host=config.host, is_loopback=is_loopback(sockets), keys=keys, admin_keys=admin_keys
    )
    app = create_app(state, access=config.access, limits=config.limits, answers=config.answers, rules=rules)
    start_logging()

    def load() -> ChatEngine:
        # PyTorch takes seconds; `/health` answers meanwhile.
        from glmtune.inference.load_engine import load_engine

        return load_engine(
            config.model,
            prefixes=prefixes,
            adapters=adapters,
            settings=config.engine,
            use_switch=config.use_switch,
            draft=config.draft,
        )

    def listening() -> None:
        _say(console, f"{url} serves {config.model.described}; /health says when it is loaded")
        if not is_loopback(sockets) and not keys:
            _say(
                console,
                f"warning: whoever reaches {config.host} may use it without a key. Set {KEYS_VARIABLE} or"
                " `access.api_keys_file=FILE`.",
            )

    def ready(chat: ChatEngine) -> None:
        _say(console, f"ready after {time.monotonic() - begin:.1f} s", *_facts(chat, names))
        _say(console, f"next: {_next_command(url, names[0], has_keys=bool(keys))}")

    run_server(app, state, sockets, limits=config.limits, load=load, on_listening=listening, on_ready=ready)


def _admin_keys(access: AccessSettings) -> list[str]:
    """Read the administrators' keys; none where their routes are off.

    Raises:
        ConfigError: the routes are on without a key, or with one that could be guessed.
    """
    from glmtune.serving.keys import read_keys

    if not access.admin:
        return []
    keys = read_keys("access.admin_keys_file", access.admin_keys_file, ADMIN_KEYS_VARIABLE)
    if not keys or min(map(len, keys)) < MIN_ADMIN_KEY:
        raise ConfigError(
            f"`access.admin` is True, but that needs keys of at least {MIN_ADMIN_KEY} characters, of its own,"
            f" in {ADMIN_KEYS_VARIABLE} of the environment or in `access.admin_keys_file=FILE`. Make one with"
            " `openssl rand -hex 32`, or leave `access.admin` out."
        )
    return keys


def _facts(chat: ChatEngine, names: Sequence[str]) -> list[str]:
    """Word what clients can ask for, and how much of it at once."""
    engine: Any = chat.engine
    tuned = [
        f"{info.name} ({info.kind}, {info.num_tokens} tokens)"
        if info.num_tokens
        else f"{info.name} ({info.kind})"
        for info in engine.adapters
    ]
    stats = engine.stats()
    budget, size = stats.cache_budget, stats.cache_budget * stats.token_bytes / 2**30
    return [
        f"models  {', '.join([names[0], *tuned])}",
        f"cache   {budget:,} tokens ({size:.2f} GiB) for all requests together; "
        f"{engine.max_context_tokens:,} for one",
    ]


def _next_command(url: str, model: str, *, has_keys: bool) -> str:
    """Word a request that works as it stands, in a shell of the same machine."""
    body = {"model": model, "messages": [{"role": "user", "content": "你好"}]}
    key = ['-H "Authorization: Bearer $KEY"'] if has_keys else []
    words = ["curl", f"{url}/v1/chat/completions", *key, "-H 'Content-Type: application/json'"]
    return " ".join([*words, "-d", shlex.quote(json.dumps(body, ensure_ascii=False))])


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


COMMAND = Command(
    name="serve",
    summary="Serve a model, its prefixes and LoRAs to clients of OpenAI's interface, with a chat page at /.",
    schema=ServeConfig,
    run=run,
    examples=(
        "glmtune serve",
        "glmtune serve model=THUDM/chatglm2-6b quantization=int4 prefix_path=runs/adgen",
        "glmtune serve 'prefix_path={style:runs/a,polite:runs/b}' port=9000",
        f"{KEYS_VARIABLE}=KEY glmtune serve host=0.0.0.0",
        "curl http://127.0.0.1:8000/health",
    ),
)
