"""A page of questions to read in a browser: two languages, filters, one file that loads nothing else.

The pages of mistakes and of flips differ in what an article says; everything around the articles is here and
in ``page.html``. Whoever adds HTML of his own escapes the texts of data and models in it (``html.escape``).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from evaluation.sample import ALPHABET, Sample

TEMPLATE = Path(__file__).with_name("page.html")

Word = tuple[str, str]
"""The same in English and in Chinese."""


@dataclass(frozen=True, slots=True)
class Article:
    """One question on a page.

    Attributes:
        subject: that the page can be narrowed to; plain text.
        index: row of the question in its subject, from 0.
        marks: how it went, with the word for each; filters hide by them.
        body: lines of HTML below the heading.
    """

    subject: str
    index: int
    marks: Mapping[str, Word]
    body: Sequence[str]


def both(word: Word) -> str:
    """Return a word in both languages; the page shows the one chosen."""
    english, chinese = word
    return f'<span class="en">{english}</span><span class="zh">{chinese}</span>'


def question_block(sample: Sample) -> str:
    """Return a question with what was said before it and its options, escaped."""
    options = zip(ALPHABET, sample.choices, strict=False)
    before = (turn.content for turn in sample.history)
    text = "\n".join([*before, sample.question, *(f"{letter}. {option}" for letter, option in options)])
    return f"<pre>{html.escape(text)}</pre>"


def build_page(
    title: str, counts: Sequence[str], filters: Mapping[str, Word], articles: Sequence[Article], *, width: str
) -> str:
    """Return the page as HTML.

    Args:
        title: plain text.
        counts: HTML of the line below the title.
        filters: marks that can be hidden, with the words beside their boxes.
        articles: in the order shown.
        width: of the text at most, as CSS has it.
    """
    subjects = dict.fromkeys(article.subject for article in articles)
    boxes = (
        f'<label><input type="checkbox" data-mark="{mark}" checked> {both(word)}</label>'
        for mark, word in filters.items()
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        width=width,
        hiding=", ".join(f"body.hide-{mark} .is-{mark}" for mark in filters),
        counts=" · ".join(counts),
        filters="\n".join(boxes),
        subjects="".join(f"<option>{html.escape(subject)}</option>" for subject in subjects),
        articles="\n".join(map(_article, articles)),
    )


def _article(article: Article) -> str:
    classes = " ".join(f"is-{mark}" for mark in article.marks)
    heading = " · ".join(f'<span class="{mark}">{both(word)}</span>' for mark, word in article.marks.items())
    subject = html.escape(article.subject)
    lines = (
        f'<article class="{classes}" data-subject="{subject}">',
        f"<h2>{subject} {article.index} · {heading}</h2>",
        *article.body,
        "</article>",
    )
    return "\n".join(lines)
