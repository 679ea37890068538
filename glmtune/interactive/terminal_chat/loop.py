"""The chat: a question is typed, an answer comes, and so on until the user leaves."""

from __future__ import annotations

from typing import Protocol

from glmtune.errors import GlmtuneError
from glmtune.interactive.conversation import AnswerParts, Turn
from glmtune.interactive.terminal_chat.commands import COMMANDS, message_of, read_command
from glmtune.interactive.terminal_chat.display import Display
from glmtune.interactive.terminal_chat.interrupt import keys_unseen, on_interrupt
from glmtune.interactive.terminal_chat.keyboard import was_typed
from glmtune.interactive.terminal_chat.session import Session
from glmtune.signals import StoppedBySignal


class Asks(Protocol):
    """Where questions come from: see `Keyboard`."""

    def ask(self, draft: str = "") -> str:
        """Return what was typed."""
        ...

    def ask_result(self, name: str) -> str:
        """Return the result of a tool."""
        ...


class TerminalChat:
    """One chat in a terminal."""

    def __init__(self, session: Session, keyboard: Asks, display: Display) -> None:
        """Put the parts together."""
        self.session, self._keyboard, self._display = session, keyboard, display
        self._edits: int | None = None
        self._was_interrupted = False

    def run(self) -> None:
        """Ask and answer until the user leaves."""
        try:
            while self._turn():
                pass
        except EOFError:  # Ctrl-D
            pass

    def _turn(self) -> bool:
        """Take one line; false where it was the last."""
        try:
            text = self._ask()
        except StoppedBySignal:
            raise
        except KeyboardInterrupt as stop:
            return self._interrupted(stop)
        self._was_interrupted = False
        if not text.strip():
            self._edits = None
            return True
        try:
            command = None if self._edits is not None else read_command(text)
            if command is not None:
                return self._obey(*command)
        except GlmtuneError as error:
            self._display.error(str(error))
            return True
        before = list(self.session.conversation.turns)
        self._put(text.strip() if self._edits is not None else message_of(text))
        self._answer(before)
        return True

    def _ask(self) -> str:
        turns = self.session.conversation.turns
        return self._keyboard.ask("" if self._edits is None else str(turns[self._edits]["content"]))

    def _interrupted(self, stop: KeyboardInterrupt) -> bool:
        """Take back what was typed; Ctrl-C twice at an empty prompt leaves."""
        if self._was_interrupted and not was_typed(stop):
            return False
        if self._edits is not None:
            self._display.note("[not changed]")
        elif not was_typed(stop):
            self._display.note("[Ctrl-C once more, or Ctrl-D, leaves; /help]")
        self._was_interrupted = self._edits is None and not was_typed(stop)
        self._edits = None
        return True

    def _obey(self, name: str, argument: str) -> bool:
        before = list(self.session.conversation.turns)
        outcome = COMMANDS[name].run(self.session, argument)
        if outcome.clears:
            self._display.clear()
        if outcome.says:
            self._display.say(outcome.says)
        self._edits = outcome.edits
        if outcome.is_to_answer:
            self._answer(before)
        return not outcome.is_end

    def _put(self, question: str) -> None:
        conversation = self.session.conversation
        if self._edits is None:
            conversation.ask(question)
        else:
            conversation.edit(self._edits, question)
        self._edits = None

    def _answer(self, before: list[Turn]) -> None:
        """Answer the conversation, and go on while the model calls tools and is given their results.

        Args:
            before: the messages that stand again where nothing is answered at all.
        """
        conversation = self.session.conversation
        while conversation.is_waiting:
            parts = AnswerParts()
            try:
                with keys_unseen():
                    self._stream(parts)
            except GlmtuneError as error:
                self._display.error(str(error))
            if len(parts.whole_calls) < len(parts.calls):
                self._display.note("[a call has no whole arguments and is left out]")
            if not conversation.add_answer(parts):
                conversation.turns[:] = before
                self._display.note(
                    "[nothing was answered: all is as before; the Up key brings your words back]"
                )
                return
            before = list(conversation.turns)
            self._ask_results()

    def _stream(self, parts: AnswerParts) -> None:
        is_stopped = False

        def stop_early() -> None:
            nonlocal is_stopped
            is_stopped = True

        # Two handlers: while the request is made there is nothing to stop yet.
        with on_interrupt(stop_early):
            stream = self.session.ask()
            with on_interrupt(stream.stop):
                if is_stopped:
                    stream.stop()
                self._display.answer(stream, parts)

    def _ask_results(self) -> None:
        """Ask for the results of the calls, one after the other; the first that is skipped ends it."""
        conversation = self.session.conversation
        while conversation.open_calls:
            try:
                result = self._keyboard.ask_result(conversation.open_calls[0].name)
            except StoppedBySignal:
                raise
            except KeyboardInterrupt:
                result = ""
            if not result.strip():
                self._display.note("[no result: the next question leaves the call out]")
                return
            conversation.add_tool_result(result)
