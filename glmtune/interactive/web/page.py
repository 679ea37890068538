"""What lies where on the page; what happens there is in ``events.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any

import gradio as gr

from glmtune.inference.requests.sampling import Sampling
from glmtune.interactive.answerer import AdapterChoice, Answerer
from glmtune.interactive.web.words import Words

LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
MOST_NEW_TOKENS = 8192
DEFAULT_NEW_TOKENS = 2048
"""The official demos' default of ``max_length`` in the first release; ours counts the answer alone."""
MAX_TEXT = 400_000
"""Characters of a question: more than the longest context of a release."""


@dataclass(slots=True)
class Page:
    """The components that events read or change."""

    words: Words
    chat: gr.BrowserState
    chats: gr.BrowserState
    new: gr.Button
    chat_list: gr.Radio
    delete: gr.Button
    download: gr.Button
    upload: gr.Button
    sure: gr.Textbox
    file: gr.Textbox
    adapter: gr.Dropdown
    strength: gr.Slider
    compare: gr.Checkbox
    system: gr.Textbox
    tools: gr.Textbox
    keeps_defaults: gr.Checkbox
    max_new_tokens: gr.Slider
    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    repetition_penalty: gr.Slider
    seed: gr.Number
    reset: gr.Button
    base_answers: gr.Chatbot
    answers: gr.Chatbot
    question: gr.Textbox
    unanswered: gr.Textbox

    @property
    def choices(self) -> list[Any]:
        """What every question is asked with, in the order of `asking.Choices`."""
        return [
            self.adapter,
            self.strength,
            self.compare,
            self.system,
            self.tools,
            self.keeps_defaults,
            *self.sampling,
        ]

    @property
    def sampling(self) -> list[Any]:
        """The controls of sampling."""
        return [
            self.max_new_tokens,
            self.temperature,
            self.top_p,
            self.top_k,
            self.repetition_penalty,
            self.seed,
        ]


def theme() -> gr.themes.Base:
    """Return colours and fonts; the fonts are the system's, as others would be loaded from somewhere."""
    return gr.themes.Default(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="stone",
        radius_size="lg",
        font=[
            "system-ui",
            "-apple-system",
            "Segoe UI",
            "PingFang SC",
            "Noto Sans CJK SC",
            "Microsoft YaHei",
            "sans-serif",
        ],
        font_mono=["ui-monospace", "SFMono-Regular", "Consolas", "Noto Sans Mono CJK SC", "monospace"],
    )


def lay_out(answerer: Answerer, words: Words, *, has_login: bool) -> Page:
    """Put everything into the open Blocks; return what events need."""
    parts: dict[str, Any] = {"words": words}
    # Fixed, as a random one would forget all chats whenever the server starts anew: it hides nothing anyway.
    keeping: dict[str, Any] = {"secret": "glmtune", "storage_key": "glmtune-chat"}
    parts["chat"] = gr.BrowserState(None, **keeping)
    keeping["storage_key"] = "glmtune-chats"
    parts["chats"] = gr.BrowserState([], **keeping)
    with gr.Sidebar(width=320, elem_id="side"):
        parts |= _chat_list(words)
        parts |= _tuning(answerer.adapters, words)
        parts |= _instructions(answerer, words)
        parts |= _sampling(answerer.sampling_defaults, words)
    gr.HTML(_top(answerer.model_name, words, has_login=has_login), elem_id="top", padding=False)
    with gr.Row(elem_id="answers"):
        parts["base_answers"] = _answers(words, visible=False, elem_id="base")
        parts["answers"] = _answers(words, visible=True, elem_id="main")
    parts["question"] = gr.Textbox(
        placeholder=words.ask,
        show_label=False,
        label=words.ask,
        lines=1,
        max_lines=8,
        max_length=MAX_TEXT,
        submit_btn=True,
        interactive=False,  # until the browser's chat is there
        elem_id="question",
    )
    parts["unanswered"] = gr.Textbox(visible=False)
    assert parts.keys() == {item.name for item in fields(Page)}
    return Page(**parts)


def _top(model_name: str, words: Words, *, has_login: bool) -> str:
    logout = f'<a href="./logout">{escape(words.logout)}</a>' if has_login else ""
    return (
        f'<div class="bar"><span class="model">{escape(model_name)}</span><span class="links">'
        f'<a id="other_language" href="{words.other_path}">{escape(words.other)}</a>{logout}</span></div>'
    )


def _answers(words: Words, *, visible: bool, elem_id: str) -> gr.Chatbot:
    return gr.Chatbot(
        label=words.base_answer,  # of the tuned model's: its name, see `PageEvents.show_compared`
        show_label=False,
        visible=visible,
        elem_id=elem_id,
        height="100%",
        min_height=120,
        min_width=280,
        editable="user",
        buttons=["copy"],
        feedback_options=None,
        latex_delimiters=LATEX,
        allow_tags=False,
        group_consecutive_messages=False,
        placeholder=f'<div class="hello">{escape(words.hello)}</div>',
        layout="bubble",
        allow_file_downloads=False,
    )


def _chat_list(words: Words) -> dict[str, Any]:
    parts: dict[str, Any] = {"new": gr.Button(words.new_chat, variant="secondary", elem_id="new")}
    parts["chat_list"] = gr.Radio([], label=words.chats, info=words.no_chats, elem_id="chat_list")
    with gr.Row():
        small: dict[str, Any] = {"size": "sm", "min_width": 40, "elem_classes": "small"}
        parts["download"] = gr.Button(words.download, elem_id="download", **small)
        parts["upload"] = gr.Button(words.upload, elem_id="upload", **small)
        parts["delete"] = gr.Button(words.delete, elem_id="delete", **small)
    parts["file"] = gr.Textbox(visible=False)
    parts["sure"] = gr.Textbox(words.delete_sure, visible=False)
    return parts


def _tuning(adapters: Sequence[AdapterChoice], words: Words) -> dict[str, Any]:
    """What was tuned, if anything was: the first is chosen, as one comes to see it."""
    choices = [(f"{each.name} ({each.kind})", each.name) for each in adapters]
    first = adapters[0] if adapters else None
    with gr.Accordion(words.tuned, open=True, visible=bool(adapters)):
        return {
            "adapter": gr.Dropdown(
                [*choices, (words.base_alone, "")],
                value=first.name if first else "",
                label=words.adapter,
                filterable=False,
                elem_id="adapter",
            ),
            "strength": gr.Slider(
                0,
                2,
                1,
                step=0.05,
                label=words.strength,
                info=words.strength_info,
                visible=first is not None and first.has_strength,
                elem_id="strength",
            ),
            "compare": gr.Checkbox(False, label=words.compare, elem_id="compare"),
        }


def _instructions(answerer: Answerer, words: Words) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    with gr.Accordion(words.system, open=False, elem_id="system_part"):
        parts["system"] = gr.Textbox(
            lines=3,
            max_lines=10,
            max_length=MAX_TEXT,
            placeholder=words.system_hint,
            show_label=False,
            elem_id="system",
        )
    with gr.Accordion(words.tools, open=False, visible=answerer.knows_tools):
        parts["tools"] = gr.Textbox(
            lines=4,
            max_lines=16,
            max_length=MAX_TEXT,
            info=words.tools_info,
            label=words.tools,
            elem_id="tools",
        )
    return parts


def _sampling(known: Sampling | None, words: Words) -> dict[str, Any]:
    """Controls that begin where the release does; a server does not say, and decides unless it is told to."""
    defaults = known or Sampling(temperature=0.8, top_p=0.8)
    longest = min(defaults.max_new_tokens or DEFAULT_NEW_TOKENS, MOST_NEW_TOKENS)
    with gr.Accordion(words.sampling, open=False, elem_id="sampling"):
        return {
            "keeps_defaults": gr.Checkbox(
                known is None, label=words.keeps_defaults, visible=known is None, elem_id="keeps_defaults"
            ),
            "max_new_tokens": gr.Slider(
                0,
                MOST_NEW_TOKENS,
                longest,
                step=1,
                label=words.max_new_tokens,
                info=words.max_new_tokens_info,
                elem_id="max_new_tokens",
            ),
            "temperature": gr.Slider(
                0,
                2,
                defaults.temperature,
                step=0.01,
                label=words.temperature,
                info=words.temperature_info,
                elem_id="temperature",
            ),
            "top_p": gr.Slider(0.01, 1, defaults.top_p, step=0.01, label=words.top_p, elem_id="top_p"),
            "top_k": gr.Slider(
                0, 200, defaults.top_k, step=1, label=words.top_k, info=words.top_k_info, elem_id="top_k"
            ),
            "repetition_penalty": gr.Slider(
                0.5,
                2,
                defaults.repetition_penalty,
                step=0.01,
                label=words.repetition_penalty,
                elem_id="repetition_penalty",
            ),
            "seed": gr.Number(
                None,
                label=words.seed,
                info=words.seed_info,
                precision=0,
                minimum=0,
                maximum=2**32 - 1,
                elem_id="seed",
            ),
            "reset": gr.Button(words.reset, size="sm"),
        }
