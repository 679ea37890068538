"""What a user may type beside questions: `/`-words that show and change how it goes on, and how to leave.

The words ``clear``, ``stop``, ``exit`` and ``quit`` alone are commands as well, as in the official demos. A
message that begins with a slash but is no command is never sent by mistake: ``//`` in front sends it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from glmtune.errors import ConfigError
from glmtune.interactive.conversation import Conversation
from glmtune.interactive.terminal_chat.session import (
    SAMPLING,
    Session,
    read_tools_file,
    tool_name,
)
from glmtune.terminal.console import plain

BARE_WORDS = {"clear": "clear", "stop": "stop", "exit": "stop", "quit": "stop"}
RELEASE = ("default", "off", "none")
"""Words that take a choice back."""
SPEAKERS = {"system": "system", "user": "you", "assistant": "model", "tool": "result"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What follows a command.

    Attributes:
        says: shown to the user.
        is_to_answer: the conversation is to be answered as it stands.
        is_end: the chat is over.
        clears: the screen is emptied first.
        edits: the place of the question that is put up for editing.
    """

    says: str | Text = ""
    is_to_answer: bool = False
    is_end: bool = False
    clears: bool = False
    edits: int | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """One command: what follows its name, what it is for, and what does it."""

    argument: str
    summary: str
    run: Callable[[Session, str], Outcome]


def read_command(text: str) -> tuple[str, str] | None:
    """Return the name of a command and what follows it; None where the text is a message.

    Raises:
        ConfigError: it begins with a slash and is no command.

    >>> read_command("/temperature 0.5"), read_command("stop"), read_command("//etc"), read_command("stop it")
    (('temperature', '0.5'), ('stop', ''), None, None)
    """
    text = text.strip()
    if text in BARE_WORDS:
        return BARE_WORDS[text], ""
    if not text.startswith("/") or text.startswith("//"):
        return None
    name, _, argument = text[1:].partition(" ")
    name = BARE_WORDS.get(name, name)
    if name in COMMANDS:
        return name, argument.strip()
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    guess = f" Did you mean `/{near[0]}`?" if near else ""
    raise ConfigError(
        f"`/{name[:40]}` is no command.{guess} /help lists them. To send a message that begins with a slash,"
        f" write two: `//{name[:40]}`."
    )


def message_of(text: str) -> str:
    """Return the message that is sent: one slash of two in front is taken off.

    >>> message_of("//etc/hosts"), message_of("  你好 ")
    ('/etc/hosts', '你好')
    """
    text = text.strip()
    return text[1:] if text.startswith("//") else text


def goes_on(text: str) -> bool:
    r"""Whether a line ends with a backslash that asks for another one; a pair of them is just text.

    >>> goes_on("two lines\\"), goes_on("a line break in LaTeX: \\\\"), goes_on("")
    (True, False, False)
    """
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


# ---- showing


def _help(session: Session, argument: str) -> Outcome:
    rows = [(f"/{name} {each.argument}".rstrip(), each.summary) for name, each in COMMANDS.items()]
    width = max(len(left) for left, _ in rows) + 2
    text = Text()
    for left, right in rows:
        text.append(f"{left:<{width}}", "bold").append(f"{right}\n")
    text.append(
        "Enter sends; Alt-Enter, or \\ at the end, begins a new line; lines that are pasted stay together.\n"
        "Ctrl-C stops an answer, Ctrl-D leaves. `clear` and `stop` work without a slash, too.\n"
        "A message that begins with a slash is written with two."
    )
    return Outcome(text)


def _history(session: Session, argument: str) -> Outcome:
    text, number = Text(), 0
    for turn in session.conversation.messages:
        role = turn["role"]
        number += role == "user"
        label = f"{number} {SPEAKERS[role]}: " if role == "user" else f"  {SPEAKERS[role]}: "
        text.append_text(plain(label, "bold"))
        calls = [call["function"] for call in turn.get("tool_calls", ())]
        words = [turn["content"], *(f"calls {call['name']} {call['arguments']}" for call in calls)]
        text.append_text(plain("\n".join(filter(None, words)).replace("\n", "\n     ")))
        text.append("\n")
    text.rstrip()
    return Outcome(text if text.plain else "Nothing was said yet.")


# ---- how it is answered


def _system(session: Session, argument: str) -> Outcome:
    if argument:
        session.conversation.system = "" if argument in RELEASE else argument
    said = session.conversation.system
    return Outcome(f"system: {said}" if said else "No system prompt. /system TEXT sets one.")


def _sampling(name: str) -> Callable[[Session, str], Outcome]:
    """Return the command of one field of the sampling."""
    kind = SAMPLING[name]

    def run(session: Session, argument: str) -> Outcome:
        if argument in RELEASE:
            session.choose_sampling(name, None)
        elif argument:
            session.choose_sampling(name, _number(f"/{name}", argument, kind))
        return Outcome(f"{name}: {sampling_words(session)[name]}")

    return run


def sampling_words(session: Session) -> Mapping[str, str]:
    """Return what holds of every field of the sampling, and who says so."""
    defaults = session.answerer.sampling_defaults

    def words(name: str) -> str:
        if name in session.sampling:
            return f"{session.sampling[name]}"
        if defaults is None:
            return "as the server decides"
        value = getattr(defaults, name)
        none = {"max_new_tokens": "what the context leaves", "seed": "drawn for each answer"}
        return f"{none.get(name, 'none') if value is None else value} (default)"

    return {name: words(name) for name in SAMPLING}


def _number(what: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        word = "a whole number" if kind is int else "a number"
        raise ConfigError(
            f"`{what}` is `{text[:40]}`, but it must be {word}. `{what} default` takes a choice back."
        ) from None


def _adapter(session: Session, argument: str) -> Outcome:
    if argument:
        session.choose_adapter("" if argument in (*RELEASE, "base") else argument)
    there = [f"{each.name} ({each.kind})" if each.kind else each.name for each in session.answerer.adapters]
    choice = f"; there are: {', '.join(there)}, base" if there else "; no other was loaded"
    return Outcome(f"adapter: {session.adapter or 'none, the base'}{'' if argument else choice}")


def _strength(session: Session, argument: str) -> Outcome:
    if argument:
        session.choose_strength(1.0 if argument in RELEASE else _number("/strength", argument, float))
    return Outcome(f"strength: {session.strength:g}")


def _tools(session: Session, argument: str) -> Outcome:
    if argument:
        session.offer_tools([] if argument in RELEASE else read_tools_file(argument))
    names = ", ".join(tool_name(tool) for tool in session.tools)
    return Outcome(f"tools: {names}" if names else "No tools. /tools FILE offers those of a JSON file.")


# ---- the conversation


def _clear(session: Session, argument: str) -> Outcome:
    session.conversation.clear()
    return Outcome("The conversation begins anew.", clears=True)


def _undo(session: Session, argument: str) -> Outcome:
    return Outcome(f"Taken back: {session.conversation.undo()}")


def _retry(session: Session, argument: str) -> Outcome:
    if not session.conversation.is_waiting:
        session.conversation.regenerate()
    return Outcome(is_to_answer=True)


def _edit(session: Session, argument: str) -> Outcome:
    turns = session.conversation.turns
    places = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    number = _number("/edit", argument, int) if argument else len(places)
    if not 1 <= number <= len(places):
        raise ConfigError(
            f"There is no question {number}: {len(places)} were asked. /history shows their numbers."
        )
    return Outcome(edits=places[number - 1])


def _save(session: Session, argument: str) -> Outcome:
    if not argument:
        raise ConfigError("`/save` needs the name of a file: `/save talk.json`.")
    return Outcome(f"Saved: {session.conversation.save(argument)}")


def _load(session: Session, argument: str) -> Outcome:
    if not argument:
        raise ConfigError("`/load` needs the name of a file that /save wrote: `/load talk.json`.")
    session.conversation = Conversation.load(argument)
    return Outcome(f"{len(session.conversation.turns)} messages; /history shows them.")


def _stop(session: Session, argument: str) -> Outcome:
    return Outcome(is_end=True)


_SUMMARIES = {
    "temperature": ("X", "0 takes the likeliest token each time; `default` takes a choice back"),
    "top_p": ("X", "draw from the likeliest tokens up to this sum of probabilities"),
    "top_k": ("N", "draw from so many of the likeliest tokens; 0: all"),
    "max_new_tokens": ("N", "longest answer, in tokens"),
    "repetition_penalty": ("X", "makes tokens that were there less likely; 1: not"),
    "seed": ("N", "of the drawing: the same question, the same answer"),
}
COMMANDS: Mapping[str, Command] = {
    "help": Command("", "this list", _help),
    "system": Command("TEXT", "set the system prompt; `off` removes it", _system),
    **{name: Command(argument, summary, _sampling(name)) for name, (argument, summary) in _SUMMARIES.items()},
    "adapter": Command("NAME", "answer with this prefix or LoRA; `base`: with none", _adapter),
    "strength": Command("X", "of the prefix or LoRA: 1 as tuned, 0 the base", _strength),
    "tools": Command("FILE", "let the model call the tools of a JSON file; `off`: none", _tools),
    "history": Command("", "show what was said", _history),
    "retry": Command("", "write the last answer anew", _retry),
    "edit": Command("N", "change the last question, or question N; what followed is forgotten", _edit),
    "undo": Command("", "take the last question and its answer back", _undo),
    "save": Command("FILE", "write the conversation to a file", _save),
    "load": Command("FILE", "go on with a conversation of a file", _load),
    "clear": Command("", "forget what was said", _clear),
    "stop": Command("", "leave (also exit, quit, Ctrl-D)", _stop),
}
