"""A tokenizer as the keys of a GGUF file: pieces, their kinds, and how texts are cut into them.

llama.cpp knows two ways that GLMs have::

    llama   sentencepiece's byte-pair encoding: pieces with scores, bytes for what no piece holds; a blank in
            front of a text and behind every special token (ChatGLM2, ChatGLM3)
    gpt2    byte-level pairs in the order of their merges, words cut by a pattern that is compiled in and has
            a name (GLM-4, GLM-Edge, 0414)

Special tokens are control tokens, found in whatever prompt a program renders. A bare ``sop`` would then be
found in "philosophers", so it is called ``<sop>``, as in our exports for transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from glmtune.errors import CheckpointError
from glmtune.export.gguf.pieces import check_pieces
from glmtune.export.gguf.templates import PROMPTS
from glmtune.export.tokenizer import fast_tokenizer
from glmtune.models.releases.families import Family
from glmtune.models.templates.renderer import template_for
from glmtune.models.tokenizers.chatglm2_and_3 import SentencePieceGlmTokenizer
from glmtune.models.tokenizers.glm4 import WORDS
from glmtune.models.tokenizers.tokenizer_json import JsonTokenizer
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens as llama.cpp numbers them."""
_BARE_NAMES = {"sop": "<sop>", "eop": "<eop>"}
END_KEYS = ("eos", "eot", "eom")
"""Keys of tokens at which llama.cpp ends an answer, by the order of a template's ``stop_ids``."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: ``llama`` or ``gpt2``.
        pattern: name of the pattern that cuts words.
        tokens: by id; as many as the embedding has rows.
        kinds: of each.
        scores: of each; ``llama`` only.
        merges: pairs, the first first; ``gpt2`` only.
        special_ids: ``eos`` and the like → id.
        chat_template: Jinja, if there is one.
        prefix: names of the tokens that stand in front of plain text.
    """

    model: str
    pattern: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    special_ids: Mapping[str, int] = field(default_factory=dict[str, int])
    chat_template: str | None = None
    prefix: str = ""

    def ends(self) -> tuple[str, ...]:
        """Texts of the tokens that end an answer."""
        return tuple(self.tokens[self.special_ids[key]] for key in END_KEYS if key in self.special_ids)


def vocabulary_of(tokenizer: VocabularyTokenizer, num_rows: int) -> Vocabulary:
    """Translate a tokenizer.

    Args:
        tokenizer: of ChatGLM2 or later, or of a folder in transformers' format.
        num_rows: of the embedding.

    Raises:
        CheckpointError: its rules are none of those that llama.cpp has, it has more tokens than the model
            rows, or two with the same name.
    """
    if isinstance(tokenizer, SentencePieceGlmTokenizer):
        found = _from_sentencepiece(tokenizer)
        check_pieces(found.names, found.scores, tokenizer)
    elif isinstance(tokenizer, JsonTokenizer):
        found = _from_json(json.loads(tokenizer.processor.to_str()))
    else:
        found = _from_json(json.loads(fast_tokenizer(tokenizer).backend_tokenizer.to_str()))
    for index, token in tokenizer.added_tokens_decoder.items():
        found.names.setdefault(index, str(token))
        found.kinds.setdefault(index, CONTROL if token.special else USER_DEFINED)
    tokens, kinds = _filled(found, num_rows)
    template = tokenizer.chat_template
    if tokenizer.family is not Family.TRANSFORMERS:
        template = PROMPTS.get(tokenizer.family)
    return Vocabulary(
        found.model,
        found.pattern,
        tokens,
        kinds,
        tuple(found.scores.get(index, 0.0) for index in range(num_rows)) if found.model == "llama" else (),
        tuple(found.merges),
        _special_ids(tokenizer, found),
        template if isinstance(template, str) else None,
        "".join(tokens[index] for index in tokenizer.prefix_ids),
    )


@dataclass(slots=True)
class _Found:
    """What was read of a tokenizer: id → name, kind and score."""

    model: str
    pattern: str
    names: dict[int, str] = field(default_factory=dict[int, str])
    kinds: dict[int, int] = field(default_factory=dict[int, int])
    scores: dict[int, float] = field(default_factory=dict[int, float])
    merges: list[str] = field(default_factory=list[str])

    def name_controls(self, controls: Mapping[str, int]) -> None:
        """Take special tokens, whose names may have been taken before."""
        for name, index in controls.items():
            self.names[index], self.kinds[index] = _BARE_NAMES.get(name, name), CONTROL


def _from_sentencepiece(tokenizer: SentencePieceGlmTokenizer) -> _Found:
    found = _Found("llama", "default")
    file = tokenizer.sp_model
    for index in range(file.get_piece_size()):
        found.names[index], found.scores[index] = file.IdToPiece(index), file.GetScore(index)
        found.kinds[index] = (
            UNKNOWN
            if file.IsUnknown(index)
            else CONTROL
            if file.IsControl(index)
            else BYTE
            if file.IsByte(index)
            else UNUSED
            if file.IsUnused(index)
            else NORMAL
        )
    found.name_controls({name: tokenizer.get_command(name) for name in tokenizer.COMMANDS})
    return found


def _from_json(content: dict[str, Any]) -> _Found:
    """Read a tokenizer.json.

    Raises:
        CheckpointError: see `vocabulary_of`.
    """
    model = content["model"]
    is_pairs = model.get("type") == "BPE"
    if is_pairs and model.get("byte_fallback") and _prepends_blank(content):
        found = _Found("llama", "default")
        found.scores = _scores(model["vocab"], _merges(model))
    elif is_pairs and _is_byte_level(content):
        # With `ignore_merges` a word that is a piece is taken whole, whatever its merges are; llama.cpp has
        # the same pattern under two names, one for each rule.
        found = _Found("gpt2", "glm4" if model.get("ignore_merges") else "chatglm-bpe")
        found.merges = [" ".join(pair) for pair in _merges(model)]
    else:
        raise CheckpointError(
            "The folder's tokenizer.json has rules that llama.cpp has not: it knows GLM's byte-level pairs "
            "with GLM-4's pattern of words, and sentencepiece's with bytes for what no piece holds. Use "
            "`format=transformers`."
        )
    for piece, index in model["vocab"].items():
        found.names[index] = piece
        is_byte = found.model == "llama" and len(piece) == 6 and piece.startswith("<0x")
        found.kinds[index] = BYTE if is_byte else UNKNOWN if piece == model.get("unk_token") else NORMAL
    for token in content["added_tokens"]:
        if token.get("lstrip") or token.get("rstrip"):
            raise CheckpointError(
                f"The token {token['content']!r} swallows blanks beside it (`lstrip`, `rstrip`), which no "
                "key of a GGUF file says. Add it anew without."
            )
        if found.kinds.get(token["id"]) != UNKNOWN:
            found.kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        found.names[token["id"]] = token["content"]
    return found


def _merges(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the pairs of a tokenizer.json, which older versions of the library wrote as one text each."""
    return [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]


def _prepends_blank(content: Mapping[str, Any]) -> bool:
    """Whether the normalizer is that of our translated sentencepiece files."""
    steps = [step for step in _steps(content, "normalizer") if not _drops_mark(step)]
    wanted = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    return steps == wanted and content.get("pre_tokenizer") is None


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    """Whether words are cut as GLM-4 does, and then taken byte by byte."""
    steps = [step for step in _steps(content, "pre_tokenizer") if not _drops_mark(step)]
    kinds = [step["type"] for step in steps]
    if not all(map(_drops_mark, _steps(content, "normalizer"))) or kinds != ["Split", "ByteLevel"]:
        return False
    split, letters = steps
    cuts = split["behavior"].lower() == "isolated" and not split.get("invert")
    plain = not letters.get("add_prefix_space") and not letters.get("use_regex")
    return cuts and plain and split["pattern"] == {"Regex": WORDS}


def _steps(content: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, which is one step or a sequence of them."""
    whole: Mapping[str, Any] = content.get(part) or {"type": "Sequence"}
    if whole["type"] != "Sequence":
        return [whole]
    return whole.get("normalizers") or whole.get("pretokenizers") or []


def _drops_mark(step: Mapping[str, Any]) -> bool:
    """Whether a step only takes out a character that no text has (U+FDD0 to U+FDEF are for programs)."""
    pattern = step.get("pattern", {}).get("String", "")
    drops = step.get("content") == "" or str(step.get("behavior")).lower() == "removed"
    return drops and len(pattern) == 1 and "\ufdd0" <= pattern <= "\ufdef"


def _scores(vocab: Mapping[str, int], merges: Iterable[tuple[str, ...]]) -> dict[int, float]:
    """Give pieces scores in the order in which merges make them: the first made is the best."""
    scores: dict[int, float] = {}
    for pair in merges:
        scores.setdefault(vocab["".join(pair)], -float(len(scores)))
    return scores


def _filled(found: _Found, num_rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return names and kinds for every row of the embedding, those of no token included."""
    highest = max(found.names)
    if highest >= num_rows:
        raise CheckpointError(
            f"The tokenizer has a token with the id {highest} ({found.names[highest]!r}), but the model has "
            f"{num_rows} rows. Resize the embeddings to the tokenizer, or take the added tokens out."
        )
    names = tuple(found.names.get(index, f"[PAD{index}]") for index in range(num_rows))
    ids: dict[str, int] = {}
    for index, name in enumerate(names):
        if name in ids:
            raise CheckpointError(
                f"The tokens {ids[name]} and {index} are both called {name!r}, but in a GGUF file every name "
                "is there once. Rename or remove the added one."
            )
        ids[name] = index
    return names, tuple(found.kinds.get(index, UNUSED) for index in range(num_rows))


def _special_ids(tokenizer: VocabularyTokenizer, found: _Found) -> dict[str, int]:
    """Return which ids end an answer, pad, begin, and stand for the unknown."""
    stops = template_for(tokenizer).stop_ids(tokenizer)
    ids: dict[str, int] = {key: stop for key, stop in zip(END_KEYS, stops, strict=False)}
    pad = tokenizer.pad_token_id
    if isinstance(pad, int):
        ids["padding"] = pad
    # Where a key is missing llama.cpp takes LLaMA's ids. The first is never put in front of anything.
    named = {"<s>": "bos", "<unk>": "unknown"} if found.model == "llama" else {"<|endoftext|>": "unknown"}
    return ids | {named[name]: index for index, name in found.names.items() if name in named}
