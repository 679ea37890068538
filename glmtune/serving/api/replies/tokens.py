"""The text and the bytes of single tokens, as log-probabilities show them."""

from __future__ import annotations

import re
from typing import cast

from transformers import PreTrainedTokenizerBase

from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """What single tokens stand for; safe to use from any thread.

    A tokenizer decodes a token by itself otherwise than within a text: sentencepiece drops a blank at the
    start of a text, and bytes that are no whole character become U+FFFD. So a token is decoded as inside a
    text, and a token that is a byte is that byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokenizer of the model."""
        self._known: dict[int, bytes] = {}
        self._tokenizer = ours = cast("VocabularyTokenizer", tokenizer)
        self._commands = {ours.get_command(name): name for name in ours.command_names}

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text; of a command token, those of its name."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._bytes(token_id)
        return found

    def is_command(self, token_id: int) -> bool:
        """Whether a token is no text, such as ``<|user|>``."""
        return token_id in self._commands

    def text(self, token_id: int) -> str:
        """Return the text of a token; U+FFFD where it holds part of a character."""
        return self.bytes_of(token_id).decode("utf-8", "replace")

    def legacy_text(self, token_id: int) -> str:
        r"""Return the text of a token for ``/v1/completions``: part of a character is ``bytes:\xe4``."""
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._commands:
            return self._commands[token_id].encode()
        if token_id >= len(self._tokenizer):  # padding of the vocabulary, which no text is made of
            return b""
        piece: str | bytes = self._tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(piece, bytes):  # GLM-4
            return piece
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        inside = self._tokenizer.token_text(goes_on=True)
        return (inside.feed(token_id) + inside.finish()).encode("utf-8", "replace")
