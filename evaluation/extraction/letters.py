"""Rules that find the letter of a multiple-choice answer (C-Eval, MMLU) in free text.

Three rules read the same text, and reports show all three: ``script`` for figures that can be set beside
published ones, ``strict`` for answers in the requested form, ``loose`` for what the model meant. Where they
differ much, an accuracy tells more about the wording of a model than about its knowledge. The completions
quoted below are cases of ``tests/evaluation/extraction/extraction_cases.json``; a new pattern comes with a
new case.
"""

from __future__ import annotations

import re

from evaluation.extraction.text import RUN_ON, cut_at, plain, without_echo
from evaluation.sample import LETTERS, Sample

# The cascade of the C-Eval repository's ChatGLM evaluator (hkust-nlp/ceval, evaluators/chatglm.py):
# first the last cue sentence, then these words before or after a letter, in this order.
_CUE = "所以答案是"
_SCRIPT_WORDS = (
    ("", "是正确的"),
    ("选项", "正确"),
    ("答案为", ""),
    ("答案是", ""),
    ("答案", ""),
    ("选择", ""),
    ("答案：", ""),
    ("选择答案", ""),
)

# A letter ends where no word goes on: `答案是A4纸` and `the answer is Bob` name no option, `B's` no letter.
_END = r"(?![A-Za-z0-9'])"
# A small letter is a word, too, unless nothing follows: `The answer is a matter of taste`.
_SMALL = r"[a-d](?=[)\]\"'”’」』>}$]*+\s*+(?:[.。,;!:、]|\n|\Z))"
_STRICT_ZH = re.compile(rf"答案(?:是|为|：|:)\s*([A-D]{_END}|{_SMALL})")
_STRICT_EN = re.compile(rf"[Aa]nswer(?: is|:)\s*\(?(?:([A-D])\)?{_END}|({_SMALL}))")

# An answer may be a megabyte of one sign, so no pattern tries a stretch twice: what cannot usefully be given
# back is taken for good (`*+`).

# What models put between a cue and the letter: `答案是“B”`, `答案是【B】`, `$B$`, `答案选项：B`, `option
# (B)`.
_OPENING = r"[\s\"'“”‘’「『<(\[{$:,]*+"
_NOUN = r"(?:选项|选择|项|[Oo]ption|[Cc]hoice|[Ll]etter)?+"
_LETTER = rf"{_OPENING}{_NOUN}{_OPENING}(?:([A-D]){_END}|({_SMALL}))"
_MARKERS_ZH = (
    r"(?:答案|正确选项|正确的选项|正确项|正确的是|符合题意的是|不正确的是|错误的是)"
    r"(?:应该|应当|应|就|选项)?+(?:是|为|选择|选|:|=|-)*+"
)
# 选 states an answer only where it denies none (不选A, 不能选A) and is not part of another word (备选, 待选,
# 挑选, 可选).
_CHOOSE_ZH = r"(?<![不可能该备挑待])(?:(?<!不)该|(?<!不)应|(?<!不)能)?(?:选择|选项是|选|故选)(?:是|为|:)?"
# `The answer to this question is most likely option B`: any of these words may stand between cue and letter.
_MARKERS_EN = (
    r"(?i:answer|correct option|correct choice|correct letter|best option|best choice|right option|choice)"
    r"(?i:\s*(?:is|are|:|=|would be|must be|should be|has to be|will be|here|therefore|thus|most likely|"
    r"probably|to the question|to this question|option|choice|the|clearly|indeed))*+"
)
_CHOOSE_EN = r"(?<!not )(?i:\bchoose|\bselect|\bpick|\bgo with|\bgo for)"
# An English cue without a letter matches too, with no group: the `choice`s inside it lead to the same place,
# and searching again from each of them would take the square of their number.
_EXPLICIT = re.compile(
    rf"(?:(?<!#)####++|{_MARKERS_ZH}|{_CHOOSE_ZH}|{_CHOOSE_EN}){_LETTER}|(?>{_MARKERS_EN})(?:{_LETTER})?"
)
# After a letter, more letters follow: `答案是A和B`, `The answer is A or B`. That is no answer to a question
# with one.
_SEVERAL = re.compile(
    r"\s*+(?:[)\]]\s*+)?(?:和|与|或者|或|及|、|,|/|&|and|or)\s*+(?:[(\[]\s*+)?(?:选项|option )?"
    r"[A-D](?![A-Za-z0-9'])"
)
_SEVERAL_SMALL = re.compile(
    r"\s*+(?:[)\]]\s*+)?(?:和|与|或者|或|及|、|,|/|&|and|or)\s*+(?:[(\[]\s*+)?[a-d](?![A-Za-z0-9'])"
)
# `A不正确，B正确`, `B is the correct answer`. Not the last of a list: `A、B都对`, `A, B and C are correct`
# name several.
_SAID_RIGHT = re.compile(
    r"(?<![A-Za-z0-9])(?<![,、和与及])(?<!, )(?<!and )(?<!or )[(\[]?([A-D])[)\]]?\s*+(?:(?:选项|项)\s*+)?"
    r"(?:(?:是|为|才是|:)\s*+)?(?:正确|对的|(?i:is (?:the )?(?:correct|right|best)|is true))"
)
# A line that begins with its answer: `B. 零基预算`, `(B)`, `B 零基预算`; English prose may begin with `A` as
# well, so a blank counts only before a Chinese character.
_FIRST = re.compile(
    r"\s*(?:选项|[Oo]ption )?[(\[]?"
    r"(?:([A-D])(?:[)\].、:,。]|\s*$|\s+(?=[\u4e00-\u9fff]))(?![A-Za-z0-9'])|([a-d])(?:[)\]]|\.?\s*$))"
)
# `A good question.` begins with an article, `A is wrong because` with a letter: what follows tells them
# apart.
_ARTICLE = r"A(?= (?!is\b|because\b|since\b|as\b|for\b|and\b|or\b)[a-z])"
_ALONE = re.compile(rf"(?<![A-Za-z0-9'])(?!{_ARTICLE})([A-D])(?![A-Za-z0-9'])")
# What the text rejects is cut out before anything is looked for: `排除A、C、D，选B`, `The answer is not A,
# it is B`, `A is wrong. C is wrong. D is wrong. That leaves B.`
_LIST = r"\s*+(?:选项\s*+)?[(\[]?[A-D](?:\s*(?:、|,|和|与|及|and|or)+\s*[A-D])*(?![A-Za-z0-9'])"
_REJECTED = re.compile(
    rf"(?:不选|不能选|不应选|不该选|不应该选|排除|不是|(?i:\bnot|\bisn't|\bexclude|\brule out)\s){_LIST}"
    r"|(?<![A-Za-z0-9])[A-D](?:选项|项)?\s*+(?:(?:是|为)\s*+)?"
    r"(?:不正确|错误|不对|错的|(?i:is (?:wrong|incorrect|false|not)))"
)

# What states an option by its text instead of its letter: `The answer is French.`, `应采用零基预算`.
_OPTION_CUE = re.compile(
    rf"(?:{_MARKERS_ZH}|{_CHOOSE_ZH}|应该?(?:采用|选用|是|为)|{_CHOOSE_EN}|{_MARKERS_EN}){_OPENING}"
)
_OPTION_END = re.compile(r"[)\]\"'”’」』>}$]*+\s*+(?:[.。,;!:、]|\n|\Z|because\b|since\b)")
_OPTION_MARKS = " \t\"'“”‘’.。,;!:()[]"
# Options of another question: a base model goes on with one, in the form of the exemplars before its own.
_OPTIONS = re.compile(r"^[ \t]*\(?A[.)、:][ \t]*+(.*)\n+[ \t]*\(?B[.)、:]", re.MULTILINE)
_ASKS = ("?", "？", "__", "()", "( )", "（）", "（ ）")
_MOST_BLOCKS = 8


def given(text: str, sample: Sample) -> str:
    """Return the letter that the choice scores name; nothing has to be extracted."""
    del sample
    return text


def script(text: str, sample: Sample) -> str | None:
    """Extract as the C-Eval repository's script for ChatGLM does, its order and its faults included.

    The last ``所以答案是X。`` first, then eight wordings, then a text with exactly one of the letters A to D,
    then a text that quotes exactly one option. The faults stay because published figures have them: of
    ``答案是A和B`` it takes A, and the first wording matches before a later one that fits better.
    """
    text = text.strip()
    cue = _last_cue(text)
    if len(cue) == 1 and cue in LETTERS:
        return cue
    for before, after in _SCRIPT_WORDS:
        if found := re.search(f"{before}([ABCD]){after}", text):
            return found.group(1)
    letters = re.findall("[ABCD]", text)
    if len(letters) == 1:
        return letters[0]
    return _quoted_option(text, sample)


def _last_cue(text: str) -> str:
    """Return what the last match of ``所以答案是(.+?)。`` captures, empty without one.

    By hand, as the expression would look for the full stop from every cue anew.
    """
    found, place, line_end = "", 0, -1
    while (place := text.find(_CUE, place)) >= 0:
        begin = place + len(_CUE)
        if line_end < begin:
            line_end = text.find("\n", begin)
            line_end = len(text) if line_end < 0 else line_end
        stop = text.find("。", begin + 1, line_end)
        found, place = (found, line_end) if stop < 0 else (text[begin:stop], stop + 1)
    return found


def strict(text: str, sample: Sample) -> str | None:
    """Extract the letter of the last sentence that states the answer in so many words, nothing else."""
    text = _answered(text, sample)
    found = [match for pattern in (_STRICT_ZH, _STRICT_EN) for match in pattern.finditer(text)]
    return _stated(max(found, key=lambda match: match.start()), text) if found else None


def loose(text: str, sample: Sample) -> str | None:
    r"""Extract what a careful reader would.

    In this order: the last explicit statement (``答案是B``, ``故选（B）``, ``the answer is **B**``,
    ``\boxed{B}``); the last letter called right; a letter that the text begins with, or that is its last
    line; the only letter standing alone; an option stated in its own words. Letters that the text rejects
    (``不选A``, ``A is wrong``) are passed over; a statement that names several letters counts as no answer.
    """
    text = _REJECTED.sub(" ", plain(_answered(text, sample)))
    # The last statement counts, not the first: models correct themselves
    # (`所以答案是A。不对，重新考虑。所以答案是B。`).
    statements = [cue for cue in _EXPLICIT.finditer(text) if cue.lastindex]
    if statements:
        return _stated(statements[-1], text)
    if called_right := list(_SAID_RIGHT.finditer(text)):
        return called_right[-1].group(1)
    lines = text.strip().splitlines()
    # Two or more such lines are the options written out once more, not an answer.
    repeats_options = sum(_FIRST.match(line) is not None for line in lines) > 1
    for line in () if repeats_options else lines[:1] + lines[-1:]:
        first = _FIRST.match(line)
        if first and not _SEVERAL.match(line, first.end(first.lastindex or 0)):
            return first[first.lastindex or 0].upper()
    alone = set(_ALONE.findall(text))
    if len(alone) == 1:
        return alone.pop()
    return None if alone else _stated_option(text, sample)


def _stated(statement: re.Match[str], text: str) -> str | None:
    """Return the letter of a statement, None where it names several."""
    letter = statement[statement.lastindex or 0]
    several = _SEVERAL if letter.isupper() else _SEVERAL_SMALL
    return None if several.match(text, statement.end()) else letter.upper()


def _answered(text: str, sample: Sample) -> str:
    """Return what answers the question: no prompt repeated before it, no further question behind."""
    text = cut_at(without_echo(text, sample), RUN_ON)
    for block, _ in zip(_OPTIONS.finditer(text), range(_MOST_BLOCKS), strict=False):
        own = sample.choices and block[1].strip() == sample.choices[0].strip()
        before, blank, question = text[: block.start()].rstrip().rpartition("\n\n")
        # Options gone through one by one have no question of their own before them.
        if not own and blank and before.strip() and any(sign in question for sign in _ASKS):
            return before
    return text


def _stated_option(text: str, sample: Sample) -> str | None:
    """Return the letter of the option that the text states, not of one whose words it uses on the way."""
    options = {
        plain(option).strip(_OPTION_MARKS).casefold(): letter
        for letter, option in zip(LETTERS, sample.choices, strict=False)
    }
    options.pop("", None)
    lines = text.strip().splitlines()
    for line in lines[:1] + lines[-1:]:
        if letter := options.get(line.strip(_OPTION_MARKS).casefold()):
            return letter
    for cue in reversed(list(_OPTION_CUE.finditer(text))):
        for option, letter in options.items():
            end = cue.end() + len(option)
            if text[cue.end() : end].casefold() == option and _OPTION_END.match(text, end):
                return letter
    return None


def _quoted_option(text: str, sample: Sample) -> str | None:
    quoted = [letter for letter, option in zip(LETTERS, sample.choices, strict=False) if option in text]
    return quoted[0] if len(quoted) == 1 else None
