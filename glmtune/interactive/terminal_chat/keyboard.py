"""The line that is typed: history, several lines, completion, characters that take two cells.

Written on prompt_toolkit, which knows terminals, input methods and the width of characters. What is here are
the keys of a chat, where Enter sends and a paste of several lines does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from glmtune.interactive.terminal_chat.commands import COMMANDS, goes_on
from glmtune.interactive.terminal_chat.session import SAMPLING, Session

PROMPT, CONTINUED = "> ", "  "
FILE_COMMANDS = ("tools", "save", "load")


class Keyboard:
    """Reads what a user types."""

    def __init__(
        self,
        session: Session,
        *,
        history_file: Path | None = None,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        """Prepare; nothing is shown yet.

        Args:
            session: knows what can be completed.
            history_file: keeps what was typed for the next time; None keeps it in memory.
            input: where keys come from, the terminal by default.
            output: where the line is shown.
        """
        self._prompt: PromptSession[str] = PromptSession(
            history=_history(history_file),
            multiline=True,
            prompt_continuation=CONTINUED,
            key_bindings=_keys(),
            completer=CommandCompleter(session),
            complete_while_typing=Condition(self._is_command),
            reserve_space_for_menu=4,
            enable_suspend=True,
            input=input,
            output=output,
        )
        self._results: PromptSession[str] = PromptSession(multiline=True, key_bindings=_keys(), input=input,
                                                          output=output)  # fmt: skip

    def ask(self, draft: str = "") -> str:
        """Return what was typed.

        Args:
            draft: is there already, to be changed.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            EOFError: Ctrl-D.
        """
        return _clean(self._prompt.prompt([("bold", PROMPT)], default=draft))

    def ask_result(self, name: str) -> str:
        """Return the result of a tool as the user gives it, empty to give none; see `ask`."""
        return _clean(self._results.prompt([("bold", f"result of {_clean(name)!r} (Enter alone skips)> ")]))

    def _is_command(self) -> bool:
        return self._prompt.default_buffer.text.startswith("/")


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # what some terminals and scripts send for Enter
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if goes_on(buffer.document.text_before_cursor) and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("escape", "c-j")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _interrupt(event: KeyPressEvent) -> None:
        # What was typed and not sent can be brought back with the Up key.
        event.current_buffer.append_to_history()
        _exit(event.app, event.current_buffer)

    return keys


def _exit(app: Application[str], buffer: Buffer) -> None:
    app.exit(exception=_Cleared if buffer.text else KeyboardInterrupt, style="class:aborting")


class _Cleared(KeyboardInterrupt):
    """Ctrl-C where something was typed: it is taken back, and nobody wants to leave."""


def was_typed(stop: KeyboardInterrupt) -> bool:
    """Whether Ctrl-C took back a line that was being typed."""
    return isinstance(stop, _Cleared)


def _clean(text: str) -> str:
    """Return text that every encoding writes: a terminal may send bytes that are no UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _history(file: Path | None) -> History:
    if file is None:
        return InMemoryHistory()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)  # what people ask is theirs
    return _KeptHistory(str(file))


class _KeptHistory(FileHistory):
    """A history in a file; where it cannot be read or written, the chat goes on without."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(_clean(string))


class CommandCompleter(Completer):
    """Completes commands and what follows them."""

    def __init__(self, session: Session) -> None:
        """Take the session, which knows the adapters."""
        self._session = session
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield what may stand at the cursor; called by prompt_toolkit."""
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//"):
            return
        name, blank, argument = text[1:].partition(" ")
        if not blank:
            for each, command in COMMANDS.items():
                if each.startswith(name):
                    yield Completion(each, -len(name), display=f"/{each}", display_meta=command.summary)
        elif name in FILE_COMMANDS:
            rest = Document(argument, len(argument))
            yield from self._paths.get_completions(rest, complete_event)
        else:
            for word in self._words(name):
                if word.startswith(argument):
                    yield Completion(word, -len(argument))

    def _words(self, name: str) -> list[str]:
        if name == "adapter":
            return [*(each.name for each in self._session.answerer.adapters), "base"]
        return {"system": ["off"], "strength": ["0", "0.5", "1"]}.get(
            name, ["default"] if name in SAMPLING else []
        )
