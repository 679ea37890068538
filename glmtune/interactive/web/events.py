"""What happens on the page: every event reads the browser's chat, changes it, and gives it back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from html import escape
from typing import Any

import gradio as gr

from glmtune.errors import DataError, GlmtuneError
from glmtune.interactive.answerer import Answerer
from glmtune.interactive.conversation import Conversation
from glmtune.interactive.web.answering import Answering, Pages
from glmtune.interactive.web.asking import Asker, Choices
from glmtune.interactive.web.browser import CONFIRM, GIVE_BACK, ON_LOAD, OPEN_FILE, SAVE_FILE
from glmtune.interactive.web.chats import Chat, question_number, read_chat, read_chats, with_chat
from glmtune.interactive.web.page import Page
from glmtune.interactive.web.safe_markdown import plain
from glmtune.interactive.web.shown import shown, with_ending

Update = dict[Any, Any]
"""New values by component; what is not in it stays as it is."""
Updates = AsyncGenerator[Update]

# Nothing of the page is an interface for programs: that is `glmtune serve`.
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_FREE: dict[str, Any] = _QUIET | {"concurrency_limit": None}


class PageEvents:
    """The events of one page (one language); it keeps nothing of anybody's chat.

    A method that is an event takes the browser's values in the order in which `connect` names them. Gradio
    hands ``gr.Request`` and its event data to the parameters of these types.
    """

    def __init__(self, answerer: Answerer, pages: Pages, page: Page) -> None:
        """Take who answers, what is being answered, and the components."""
        self._answerer, self._pages, self._page, self._words = answerer, pages, page, page.words

    def connect(self, blocks: gr.Blocks, *, max_answers: int) -> None:
        """Tell the components what happens when.

        Args:
            blocks: that hold them.
            max_answers: most questions answered at once, on all pages together.
        """
        page = self._page
        kept = [page.chat, page.chats]
        answers: dict[str, Any] = _QUIET | {
            "outputs": [
                page.answers,
                page.base_answers,
                page.question,
                page.unanswered,
                page.chat,
                page.chats,
                page.chat_list,
            ],
            "concurrency_limit": max_answers,
            "concurrency_id": "answers",
        }
        everything = [*answers["outputs"], page.system, page.file]
        # What is sent while an answer is written is asked after it; by default Gradio would drop it, and also
        # what is sent between our last update and its own end of the event.
        asks = [
            page.question.submit(
                self.ask, [page.question, *kept, *page.choices], trigger_mode="always_last", **answers
            )
        ]
        for chatbot in (page.answers, page.base_answers):
            asks += [
                chatbot.retry(self.retry, [*kept, *page.choices], **answers),
                chatbot.edit(self.edit, [*kept, *page.choices], **answers),
            ]
            chatbot.clear(self.clear, kept, everything, **_FREE)
        boxes = [page.question, page.unanswered]
        for asked in asks:
            asked.then(None, boxes, boxes, js=GIVE_BACK)
        page.question.stop(self.stop, None, None, **_FREE)
        page.new.click(self.new_chat, kept, everything, **_FREE)
        page.chat_list.input(self.open_chat, [page.chat_list, *kept], everything, **_FREE)
        page.delete.click(self.delete_chat, [page.sure, *kept], everything, js=CONFIRM, **_FREE)
        saved = page.download.click(self.download, [page.chat], [page.file], **_FREE)
        saved.then(None, [page.file], None, js=SAVE_FILE)
        page.upload.click(self.upload, [page.file, *kept], everything, js=OPEN_FILE, **_FREE)
        page.adapter.input(self.choose_adapter, [page.adapter], [page.strength], **_FREE)
        both = [page.answers, page.base_answers]
        for control in (page.compare, page.adapter):
            control.input(self.show_compared, [page.compare, page.adapter, page.chat], both, **_FREE)
        page.reset.click(self.reset_sampling, None, page.sampling, **_FREE)
        on_load = ON_LOAD.replace("LANGUAGE", self._words.language)
        blocks.load(self.load, kept, everything, **_FREE).then(None, None, None, js=on_load)

    # Answering.

    async def ask(self, request: gr.Request, text: str, stored: Any, chats: Any, *chosen: Any) -> Updates:
        """Answer a question, or go on from the result of a tool."""
        asker, text = self._asker(chosen), plain(text)
        if asker is None or not text.strip():
            return
        chat = await self._chat(request, stored)
        chat.take_back_unanswered()
        chat.ask(text, compares=asker.compares)
        async for update in self._answer(request, chat, chats, asker):
            yield update

    async def retry(
        self, request: gr.Request, data: gr.RetryData, stored: Any, chats: Any, *chosen: Any
    ) -> Updates:
        """Answer a question anew."""
        chat = await self._chat(request, stored)
        asker = self._asker(chosen)
        if asker is None:
            return
        number = question_number(self._conversation(chat, data), _index(data))
        try:
            chat.regenerate(number, compares=asker.compares)
        except GlmtuneError as error:
            gr.Warning(escape(str(error)))
            return
        async for update in self._answer(request, chat, chats, asker):
            yield update

    async def edit(
        self, request: gr.Request, data: gr.EditData, stored: Any, chats: Any, *chosen: Any
    ) -> Updates:
        """Put another question in the place of one, and answer it."""
        chat = await self._chat(request, stored)
        asker, text = self._asker(chosen), plain(str(data.value))
        if asker is None or not text.strip():
            yield self._shown(chat)
            return
        number = question_number(self._conversation(chat, data), _index(data))
        try:
            chat.edit(number, text, compares=asker.compares)
        except GlmtuneError as error:
            gr.Warning(escape(str(error)))
            return
        async for update in self._answer(request, chat, chats, asker):
            yield update

    def stop(self, request: gr.Request) -> None:
        """End the answer that is being written; what came of it stays."""
        self._pages.stop(_page_id(request))

    async def _answer(self, request: gr.Request, chat: Chat, chats: Any, asker: Asker) -> Updates:
        """Answer what waits for an answer, in the tuned model's conversation and the base's."""
        page, words = self._page, self._words
        chat.main.system = asker.system
        waiting = [(page.answers, chat.main, asker.tuned(chat.main))] if chat.main.is_waiting else []
        if asker.compares and (base := chat.compared()).is_waiting:
            waiting.append((page.base_answers, base, asker.base(base)))
        answering = Answering([ask for _, _, ask in waiting])
        self._pages.begin(_page_id(request), answering)
        question = chat.main.turns[-1]["content"] if chat.main.turns else ""

        def written() -> Update:
            return {
                chatbot: shown(conversation, words, parts)
                for (chatbot, conversation, _), parts in zip(waiting, answering.parts, strict=True)
            }

        try:
            busy = gr.Textbox(value="", submit_btn=False, stop_btn=True)
            yield written() | {page.question: busy, page.unanswered: "", page.chat: chat.stored()}
            changes = answering.changes()
            try:
                async for _ in changes:
                    yield written()
            finally:
                await changes.aclose()
            unanswered = ""
            for (_, conversation, _), parts in zip(waiting, answering.parts, strict=True):
                if not conversation.add_answer(parts) and conversation is chat.main:
                    unanswered = question  # nothing came of it: it can be asked again
        finally:
            answering.result = chat
            self._pages.end(_page_id(request), answering)
        if answering.error:
            gr.Warning(escape(answering.error), title=words.failed)
        ended = {
            chatbot: with_ending(shown(conversation, words), parts, words)
            for (chatbot, conversation, _), parts in zip(waiting, answering.parts, strict=True)
        }
        box = {page.question: self._question_box(chat), page.unanswered: unanswered}
        yield ended | self._listed(chat, read_chats(chats)) | box

    # Chats.

    async def new_chat(self, request: gr.Request, stored: Any, chats: Any) -> Update:
        """Begin a new chat; the one that was open stays in the list."""
        old = await self._chat(request, stored)
        fresh = Chat(Conversation(old.main.system))
        return self._opened(fresh, with_chat(read_chats(chats), old))

    async def clear(self, request: gr.Request, stored: Any, chats: Any) -> Update:
        """Forget all that was said in this chat."""
        chat = await self._chat(request, stored)
        remaining = [item for item in read_chats(chats) if item["id"] != chat.id]
        chat.main.clear()
        chat.base = None
        return self._opened(chat, remaining)

    async def open_chat(self, request: gr.Request, wanted: str, stored: Any, chats: Any) -> Update:
        """Show a chat of the list."""
        listed = with_chat(read_chats(chats), await self._chat(request, stored))
        found = next((item for item in listed if item["id"] == wanted), None)
        return self._opened(read_chat(found), listed)

    async def delete_chat(self, request: gr.Request, sure: str, stored: Any, chats: Any) -> Update:
        """Forget the open chat, and show a new one."""
        if not sure:
            return {}
        chat = await self._chat(request, stored)
        remaining = [item for item in read_chats(chats) if item["id"] != chat.id]
        return self._opened(Chat(), remaining) | {self._page.file: ""}

    def download(self, stored: Any) -> str:
        """Return the open chat as JSON, for the browser to save."""
        return read_chat(stored).main.to_json()

    async def upload(self, request: gr.Request, text: str, stored: Any, chats: Any) -> Update:
        """Open a chat that the browser read from a file."""
        if not text:
            return {}
        try:
            opened = Chat(Conversation.from_json(text))
        except DataError as error:
            gr.Warning(escape(str(error)), title=self._words.unreadable)
            return {}
        listed = with_chat(read_chats(chats), await self._chat(request, stored))
        return self._opened(opened, with_chat(listed, opened)) | {self._page.file: ""}

    async def load(self, request: gr.Request, stored: Any, chats: Any) -> Update:
        """Show what the browser kept; a question whose answer was lost goes back to the box."""
        chat = await self._chat(request, stored)
        question = chat.take_back_unanswered()
        update = self._opened(chat, read_chats(chats))
        # Until now nothing could be typed, as what is asked before the chat is there would be lost with it.
        box = self._question_box(chat, value=question, interactive=True)
        return update | {self._page.question: box}

    # Controls.

    def choose_adapter(self, name: str) -> Any:
        """Show the strength where a prefix or LoRA is chosen."""
        chosen = [each for each in self._answerer.adapters if each.name == name]
        return gr.Slider(visible=any(each.has_strength for each in chosen))

    def show_compared(self, compares: bool, adapter: str, stored: Any) -> Update:
        """Show the base's answers beside those of what is chosen, or hide them."""
        both = bool(compares and adapter)
        messages: Any = shown(read_chat(stored).compared(), self._words)
        return {
            self._page.base_answers: gr.Chatbot(messages, visible=both, show_label=both),
            self._page.answers: gr.Chatbot(label=adapter or self._words.base_answer, show_label=both),
        }

    def reset_sampling(self) -> list[Any]:
        """Set the controls to what the release does."""
        return [type(control)(value=control.value) for control in self._page.sampling]

    # What events share.

    async def _chat(self, request: gr.Request, stored: Any) -> Chat:
        """Return the open chat; an answer that is being written to it is stopped first, and is in it."""
        stopped = await self._pages.stopped(_page_id(request))
        return stopped if isinstance(stopped, Chat) else read_chat(stored)

    def _asker(self, chosen: tuple[Any, ...]) -> Asker | None:
        """Read the choices; what is wrong with them is shown."""
        try:
            return Asker(self._answerer, Choices(*chosen))
        except GlmtuneError as error:
            gr.Warning(escape(str(error)))
            return None

    def _conversation(self, chat: Chat, data: gr.EventData) -> Conversation:
        return chat.compared() if data.target is self._page.base_answers else chat.main

    def _question_box(self, chat: Chat, **values: Any) -> gr.Textbox:
        calls, words = chat.main.open_calls, self._words
        placeholder = words.ask_result.format(name=calls[0].name) if calls else words.ask
        return gr.Textbox(submit_btn=True, stop_btn=False, placeholder=placeholder, **values)

    def _shown(self, chat: Chat) -> Update:
        page, words = self._page, self._words
        return {page.answers: shown(chat.main, words), page.base_answers: shown(chat.compared(), words)}

    def _listed(self, chat: Chat, chats: list[Any]) -> Update:
        listed = with_chat(chats, chat)
        entries = [(item["title"] or "…", item["id"]) for item in listed]
        chosen = chat.id if chat.main.turns else None
        return {
            self._page.chat: chat.stored(),
            self._page.chats: listed,
            self._page.chat_list: gr.Radio(choices=entries, value=chosen),
        }

    def _opened(self, chat: Chat, chats: list[Any]) -> Update:
        return (
            self._shown(chat)
            | self._listed(chat, chats)
            | {self._page.question: self._question_box(chat), self._page.system: chat.main.system}
        )


def _page_id(request: gr.Request) -> str:
    return request.session_hash or ""


def _index(data: Any) -> int:
    """Return the place of a message; Gradio names it by a pair where messages have several parts."""
    index = data.index
    return int(index[0] if isinstance(index, list | tuple) else index)
