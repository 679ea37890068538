"""The way back of a tokenizer: from a folder in transformers' format to the vocabulary file of a release.

An export of an official checkpoint has that file beside tokenizer.json. Releases in transformers' format have
tokenizer.json alone; of GLM-4's kind (byte-level BPE, pieces numbered by rank) the file follows from it. What
comes out is compared before anything is written with it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import TOKENIZERS
from glmtune.models.tokenizers.tokenizer_json import RELEASE_FILE, JsonTokenizer
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

TEXTS = (
    "你好，今天想去哪里？",
    "  Two blanks,\ttabs\n\nline  breaks; naïve café №7 😀",
    "x = [1, 23]  # 12345\n",
)
"""Where vocabularies differ first: Chinese, blanks, line breaks, digits, bytes of no piece."""
_KEPT = ("padding_side", "truncation_side", "model_max_length")


def official_tokenizer(tokenizer: JsonTokenizer, family: Family, folder: Path) -> VocabularyTokenizer:
    """Make the tokenizer of a release that gives the ids of a folder in transformers' format.

    Args:
        tokenizer: of that folder.
        family: the release.
        folder: there; the vocabulary file is put into it.

    Returns:
        The tokenizer, to be saved into ``folder``, with the tokens that users added.

    Raises:
        CheckpointError: no vocabulary file of the release can hold it, or it gives other ids.
    """
    content = tokenizer.release_file
    if content is None and family is Family.GLM4:
        content = _rank_file(tokenizer)
    if content is None:
        raise _no_file(
            tokenizer, f"it has no `{RELEASE_FILE}` beside it, and none follows from tokenizer.json alone"
        )
    file = folder / RELEASE_FILE
    file.write_bytes(content)
    official = TOKENIZERS[family](str(file), glmtune_family=family.value)
    first = official.num_reserved_ids
    added = sorted((index, name) for name, index in tokenizer.get_vocab().items() if index >= first)
    for _, name in added:
        official.add_tokens([name], special_tokens=name in tokenizer.command_names)
    _check_same(tokenizer, official, dict(added))
    if tokenizer.chat_template is not None and tokenizer.keeps_chat_template:
        official.chat_template = tokenizer.chat_template
    for name in _KEPT:
        setattr(official, name, getattr(tokenizer, name))
    return official


def _check_same(tokenizer: JsonTokenizer, official: VocabularyTokenizer, added: Mapping[int, str]) -> None:
    """Compare what both make of texts, which ids special and added tokens have, and how many there are."""
    for text in TEXTS:
        if (ours := official.text_ids(text)) != (theirs := tokenizer.text_ids(text)):
            raise _no_file(tokenizer, f"tokenizer.json gives {theirs} for {text!r}, and the file {ours}")
    found: dict[str, Any] = {name: official.get_command(name) for name in official.command_names}
    found |= {name: official.convert_tokens_to_ids(name) for name in added.values()}
    expected = {name: tokenizer.convert_tokens_to_ids(name) for name in found}
    if found != expected or len(official) != tokenizer.vocab_size:
        differing = next((name for name in found if found[name] != expected[name]), "")
        raise _no_file(
            tokenizer,
            f"`{differing}` would have the id {found[differing]} instead of {expected[differing]}"
            if differing
            else f"it has {tokenizer.vocab_size} ids, and a release with this file {len(official)}",
        )


def _rank_file(tokenizer: JsonTokenizer) -> bytes | None:
    """Return GLM-4's file of ranks; None: the vocabulary is of another kind."""
    bytes_of = _bytes_of_letters()
    special = tokenizer.processor.get_added_tokens_decoder()
    pieces = {
        index: name
        for name, index in tokenizer.processor.get_vocab(with_added_tokens=True).items()
        if index not in special
    }
    is_ranked = sorted(pieces) == list(range(len(pieces)))
    if not is_ranked or any(letter not in bytes_of for name in pieces.values() for letter in name):
        return None
    ranked = (bytes(bytes_of[letter] for letter in pieces[rank]) for rank in range(len(pieces)))
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate(ranked)]
    return ("\n".join(lines) + "\n").encode()


def _bytes_of_letters() -> dict[str, int]:
    """Return the byte that each letter of byte-level BPE stands for: itself, or one that is not visible."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(others)}


def _no_file(tokenizer: JsonTokenizer, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The tokenizer of `{tokenizer.name_or_path}` cannot be written as the official format has it: "
        f"{reason}. Use `format=transformers`."
    )
