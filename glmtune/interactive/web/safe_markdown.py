r"""What a model wrote, as Markdown in which no HTML and no picture is left.

The page's own renderer cleans HTML, and its policy lets no script of a text run (see `guard`). But a renderer
that takes tags *out* would swallow half of "close the <div> with </div>". So nothing reaches it that it could
take for a tag: outside of code, a character of no width parts ``<`` from what follows, and ``!`` from the
bracket of a picture, which becomes a link. The text looks the same, and code is left to the letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

APART = "\u200b"
"""Zero width space: not seen, and no part of any tag."""
BLANK = "\ufeff"
"""Zero width as well, but white space to the rules of Markdown: a star between two of them is a star."""
# Also indented and after a bullet, as models write code under the points of a list.
_FENCE = re.compile(
    r"[ \t]*(?:> ?)*(?:(?:[-*+]|[0-9]{1,9}[.)])[ \t]+)?(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)"
)
_CODE_SPAN = re.compile(r"(?<!`)(?P<ticks>`+)(?!`)(?P<code>.+?)(?<!`)(?P=ticks)(?!`)", re.DOTALL)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_EMPHASIS = re.compile(r"[*_~]+")
_HEADING = re.compile(r"^ {0,3}(?=[#>=-]|\* )", re.MULTILINE)
_PICTURE = re.compile(r"!(?=\[)")
# As pandoc reads them, so that "$5 and $6" stays what it is.
_INLINE_MATH = re.compile(r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*[^\s$\\])\$(?![\d$])")


def safe_markdown(text: str) -> str:
    r"""Return a text for the page's Markdown renderer.

    >>> safe_markdown("a <b>c</b>, `<b>`").encode("unicode_escape").decode()
    'a <\\u200bb>c<\\u200b/b>, `<b>`'
    """
    return "".join(block if is_code else _prose(block, _with_math) for is_code, block in _blocks(text))


def question_markdown(text: str) -> str:
    """Return a user's text to the letter, but for code and lists.

    Attributes of advertisements (``类型#裙*颜色#白色*材质#棉``) would lose their stars otherwise.
    """
    return "".join(block if is_code else _prose(block, _to_the_letter) for is_code, block in _blocks(text))


def plain(text: str) -> str:
    """Undo `question_markdown`, where a user edits or copies what he sees."""
    return text.replace(APART, "").replace(BLANK, "")


def fenced(text: str, language: str = "") -> str:
    """Return a text as a block of code that it cannot break out of."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def code_span(text: str) -> str:
    """Return a short text as code inside a line."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {' '.join(text.split())} {ticks}" if longest else f"`{' '.join(text.split()) or ' '}`"


def _blocks(text: str) -> Iterator[tuple[bool, str]]:
    """Split into prose and fenced code; a fence that is never closed runs to the end, as in renderers."""
    lines = text.splitlines(keepends=True)
    block: list[str] = []
    fence = ""
    for line in lines:
        match = _FENCE.match(line)
        if not fence and match and not (match["fence"][0] == "`" and "`" in match["info"]):
            yield False, "".join(block)
            block, fence = [line], match["fence"]
        elif fence and match and match["fence"].startswith(fence) and not match["info"].strip():
            yield True, "".join([*block, line])
            block, fence = [], ""
        else:
            block.append(line)
    yield bool(fence), "".join(block)


def _prose(text: str, change: Callable[[str], str]) -> str:
    parts: list[str] = []
    end = 0
    for match in _CODE_SPAN.finditer(text):
        if "\n\n" in match["code"]:  # a span ends with its paragraph
            continue
        parts += [change(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(text[end:])])


def _without_tags(text: str) -> str:
    return _PICTURE.sub(f"!{APART}", _TAG.sub(f"<{APART}", text))


def _with_math(text: str) -> str:
    return _INLINE_MATH.sub(r"\\(\1\\)", _without_tags(text))


def _to_the_letter(text: str) -> str:
    text = _EMPHASIS.sub(rf"{BLANK}\g<0>{BLANK}", _without_tags(text))
    return _HEADING.sub(rf"{BLANK}\g<0>", text)
