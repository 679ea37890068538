"""Talk to a model in the terminal: `glmtune chat`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmtune.errors import ConfigError
from glmtune.inference.settings import DraftSettings, EngineSettings
from glmtune.models.settings import ModelSettings
from glmtune.settings import SCALE_HELP, STRENGTH_HELP, setting
from recipes.words.compose import Command

if TYPE_CHECKING:
    from glmtune.interactive.answerer import Answerer
    from glmtune.interactive.terminal_chat.session import Session

LOCAL_ONLY = (
    "prefix_path",
    "adapter_path",
    "use_switch",
    "model",
    "engine",
    "draft",
    "quantization",
    "quantization_bit",
    "quantization_activations",
    "quantization_embeddings",
)
"""Settings of a model in this process, which a server has for itself."""
BROKEN_PIPE = 128 + 13
"""Exit code where whoever read the answers has left, as of any command that SIGPIPE ends."""


@dataclass(frozen=True)
class ChatConfig:
    """Whom to talk to, and how it answers."""

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
    prefix_strength: float = setting(1.0, STRENGTH_HELP)
    adapter_scale: float = setting(1.0, SCALE_HELP)
    system: str = setting("", "system prompt")
    temperature: float | None = setting(None, "divides the logits, 0 = greedy; default: the release's own")
    top_p: float | None = setting(None, "keep the likeliest tokens up to this sum; default: the release's")
    top_k: int | None = setting(None, "keep so many of the likeliest tokens, 0 = all; default: all")
    max_new_tokens: int | None = setting(None, "longest answer, in tokens; default: what the context leaves")
    repetition_penalty: float | None = setting(None, "above 1: tokens that were there get less likely")
    seed: int | None = setting(None, "of the drawing; default: drawn for each answer")
    tools: str | None = setting(None, "JSON file of tool descriptions (ChatGLM3, GLM-4)")
    url: str | None = setting(None, "a running server to talk to instead, such as http://127.0.0.1:8000/v1")
    url_model: str = setting("", "with url: the model to ask; default: the first that the server lists")
    history_file: str | None = setting(
        "~/.local/state/glmtune/chat_history", "keeps what was typed, for the Up key; null: nothing"
    )

    def __post_init__(self) -> None:
        """Check what needs no file.

        Raises:
            ConfigError: settings that contradict each other.
        """
        if self.url is None and self.url_model:
            raise ConfigError(
                f"`url_model` is `{self.url_model}`, but no server is named. Add `url=ADDRESS`, or name a"
                " model in this process: `model=NAME`."
            )


def run(config: ChatConfig, words: Sequence[str] = ()) -> int:
    """Talk until the user leaves, or the input ends.

    Args:
        config: all settings.
        words: overrides as they were typed, to refuse those that a server would not see.

    Returns:
        The exit code: 0; 141 where whoever read the answers has left.

    Raises:
        GlmtuneError: a setting cannot be obeyed, the model cannot be loaded, or the server cannot be reached.
    """
    from glmtune.interactive.terminal_chat.piped import run_piped, standard_input

    is_terminal = sys.stdin is not None and sys.stdin.isatty() and os.isatty(1)
    answerer, adapter = _remote(config, words) if config.url is not None else _local(config, is_terminal)
    try:
        session = _session(config, answerer, adapter)
        if is_terminal:
            _talk(config, session)
            return 0
        run_piped(session, standard_input())
        return 0
    except BrokenPipeError:
        # What is left in the buffer would be an error at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    finally:
        answerer.close()


def _local(config: ChatConfig, is_terminal: bool) -> tuple[Answerer, str]:
    """Load the model; return what answers, and the adapter to begin with."""
    from glmtune.inference.adapter_names import tuned_paths
    from glmtune.inference.load_engine import load_engine
    from glmtune.interactive.answerer import LocalAnswerer
    from glmtune.interactive.terminal_chat.display import Display

    prefixes, adapters = tuned_paths(config.prefix_path, config.adapter_path)
    if is_terminal:
        Display().note(f"loading {config.model.described} ...")
    chat = load_engine(
        config.model,
        prefixes=prefixes,
        adapters=adapters,
        settings=config.engine,
        use_switch=config.use_switch,
        draft=config.draft,
    )
    return LocalAnswerer(chat, config.model.described), next(iter([*prefixes, *adapters]), "")


def _remote(config: ChatConfig, words: Sequence[str]) -> tuple[Answerer, str]:
    """Find the server; return what answers, and the adapter to begin with."""
    from glmtune.interactive.remote import RemoteAnswerer

    given = [word.partition("=")[0].lstrip("+~") for word in words]
    given += [name for name in LOCAL_ONLY[:2] if getattr(config, name) is not None]
    local = [name for name in given if name.partition(".")[0] in LOCAL_ONLY]
    if local:
        raise ConfigError(
            f"`{local[0]}` is of a model in this process, but `url` names a server, which has its own. Leave"
            " one of them out; what the server has tuned is chosen with `url_model=NAME` or /adapter."
        )
    assert config.url is not None
    answerer = RemoteAnswerer(config.url, model=config.url_model)
    return answerer, answerer.first_adapter


def _session(config: ChatConfig, answerer: Answerer, adapter: str) -> Session:
    """Return the talk as the settings have it."""
    from glmtune.interactive.conversation import Conversation
    from glmtune.interactive.terminal_chat.session import SAMPLING, STRENGTHS, Session, read_tools_file

    session = Session(answerer, Conversation(config.system))
    session.choose_adapter(adapter)
    for kind, name in STRENGTHS.items():
        if getattr(config, name) != 1.0:
            session.set_strength(kind, getattr(config, name))
    for name in SAMPLING:
        session.choose_sampling(name, getattr(config, name))
    if config.tools is not None:
        session.offer_tools(read_tools_file(config.tools))
    return session


def _talk(config: ChatConfig, session: Session) -> None:
    """Greet, and talk in the terminal."""
    from glmtune.interactive.terminal_chat.commands import sampling_words
    from glmtune.interactive.terminal_chat.display import Display
    from glmtune.interactive.terminal_chat.keyboard import Keyboard
    from glmtune.interactive.terminal_chat.loop import TerminalChat

    display = Display()
    sampling = sampling_words(session)
    facts = [f"{session.answerer.model_name} {_place(config)}"]
    if session.adapter:
        facts.append(f"adapter {session.adapter}")
    facts += [f"{name} {sampling[name]}" for name in ("temperature", "top_p")]
    display.say("; ".join(facts))
    display.note(
        "Enter sends, Ctrl-C stops an answer, `clear` begins anew, `stop` leaves, /help shows the rest."
    )
    history = Path(config.history_file).expanduser() if config.history_file else None
    TerminalChat(session, Keyboard(session, history_file=history), display).run()


def _place(config: ChatConfig) -> str:
    if config.url is not None:
        from glmtune.interactive.remote import server_address

        return f"at {server_address(config.url).shown}"
    from glmtune.models.load import choose_device

    if config.model.is_split:
        return "split by layers over the GPUs there are"
    return f"on {choose_device(config.model.device)}"


COMMAND = Command(
    name="chat",
    summary="Talk to a model in the terminal, or answer the lines of a pipe.",
    schema=ChatConfig,
    run=run,
    bare_words=("model.source",),
    examples=(
        "glmtune chat",
        "glmtune chat THUDM/chatglm3-6b quantization=int4",
        "glmtune chat prefix_path=runs/adgen prefix_strength=0.5 temperature=0",
        'glmtune chat --system "Answer in one sentence." tools=tools.json',
        "glmtune chat url=http://127.0.0.1:8000/v1",
        "echo 你好 | glmtune chat",
    ),
    takes_words=True,
)
