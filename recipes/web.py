"""Talk to a model on a web page: `glmtune web`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glmtune.errors import ConfigError
from glmtune.inference.settings import DraftSettings, EngineSettings
from glmtune.interactive.web.settings import WebSettings
from glmtune.models.settings import ModelSettings
from glmtune.settings import setting
from recipes.words.compose import Command

if TYPE_CHECKING:
    from glmtune.interactive.answerer import Answerer
    from glmtune.terminal.console import Console


@dataclass(frozen=True)
class WebConfig(WebSettings):
    """Which model the page talks to, and where it is served."""

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
    url: str | None = setting(None, "address of a running server, such as http://127.0.0.1:8000: it answers")
    url_model: str | None = setting(None, "with url: the model to ask; default: the first that it lists")

    def __post_init__(self) -> None:
        """Check what needs no file.

        Raises:
            ConfigError: a server is named and something to load here as well.
        """
        super().__post_init__()
        loads = self.prefix_path is not None or self.adapter_path is not None or not self.use_switch
        if self.url is not None and (loads or self.model != ModelSettings()):
            raise ConfigError(
                "`url` names a server, which answers with its own model and adapters. Leave `model`,"
                " `prefix_path`, `adapter_path` and `use_switch` out, or `url`."
            )
        for name, value, usual in (
            ("draft", self.draft, DraftSettings()),
            ("engine", self.engine, EngineSettings()),
        ):
            if self.url is not None and value != usual:
                raise ConfigError(
                    f"`url` names a server, which computes as it was started, but `{name}` has settings,"
                    f" which would be ignored. Leave `{name}` out, or `url`."
                )
        if self.url_model is not None and self.url is None:
            raise ConfigError(
                f"`url_model` is `{self.url_model}`, but there is no server. Add `url=ADDRESS`, or choose a"
                " model here: `model=NAME`."
            )


def run(config: WebConfig) -> None:
    """Load the model, serve the page, and end when a signal asks for it.

    Raises:
        GlmtuneError: a setting cannot be obeyed, the model or an adapter cannot be loaded, or Gradio is not
            installed.
    """
    from glmtune.interactive.web.login import read_login
    from glmtune.interactive.web.serve import prepare, serve
    from glmtune.listening import listen, url_of
    from glmtune.terminal.console import Console

    console = Console()
    prepare()
    login = read_login(config.users)
    sockets = listen(
        config.server_name,
        config.server_port,
        host_setting="server_name",
        port_setting="server_port",
    )
    try:
        if not config.is_loopback and login is None:
            _say(
                console,
                f"warning: whoever reaches {config.server_name} may use the page. Add `users=FILE` with a"
                " line USER:PASSWORD for each who may.",
            )
        answerer = _answerer(config)
        try:
            url = url_of(sockets, config.server_name)
            _say(console, f"{answerer.model_name} is ready: open {url} (Ctrl-C ends it)")
            serve(answerer, config, login, sockets)
        finally:
            answerer.close()
    finally:
        for each in sockets:
            each.close()


def _answerer(config: WebConfig) -> Answerer:
    """Load the model here, or reach the server."""
    if config.url is not None:
        from glmtune.interactive.remote import RemoteAnswerer

        return RemoteAnswerer(config.url, model=config.url_model or "")
    from glmtune.inference.adapter_names import tuned_paths
    from glmtune.inference.load_engine import load_engine
    from glmtune.interactive.answerer import LocalAnswerer

    prefixes, adapters = tuned_paths(config.prefix_path, config.adapter_path)
    chat = load_engine(
        config.model,
        prefixes=prefixes,
        adapters=adapters,
        settings=config.engine,
        use_switch=config.use_switch,
        draft=config.draft,
    )
    return LocalAnswerer(chat, config.model.described)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


COMMAND = Command(
    name="web",
    summary="talk to a model on a web page: chats, sampling, a prefix beside its base",
    schema=WebConfig,
    run=run,
    examples=(
        "glmtune web",
        "glmtune web prefix_path=runs/ads server_port=7870",
        "glmtune web model=chatglm3-6b quantization=int4 server_name=0.0.0.0 users=users.txt",
        "glmtune web url=http://127.0.0.1:8000",
    ),
)
