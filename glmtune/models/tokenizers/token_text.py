"""Decoding one token after the other: the joined texts are those of decoding all tokens at once.

A character may be made of the bytes of several tokens, and what bytes become depends on their neighbours, so
decoding each token by itself is wrong, and decoding everything anew for each is slow. What is written here
keeps the bytes of a character that is not complete, and hands out text that no later token can change.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Any, Protocol

from sentencepiece import SentencePieceProcessor

REPLACEMENT = "\ufffd"
"""What bytes become that are no character."""


class TokenText(Protocol):
    """Decodes tokens one by one."""

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now."""
        ...

    def finish(self) -> str:
        """Return what the last tokens become if none follows."""
        ...


class PieceTable:
    """What the pieces of a sentencepiece file are inside a text, each looked up once."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        """Start empty."""
        self.decode: Callable[[list[str]], str] = processor.DecodePieces
        self._piece_to_id: Callable[[str], int] = processor.PieceToId
        self._is_byte: Callable[[int], bool] = processor.IsByte
        self._anchor = _anchor(processor)
        self._known: dict[str, str | bytes] = {}

    def __getitem__(self, piece: str) -> str | bytes:
        """Return the text of a piece that stands behind others; of a byte piece, its byte."""
        known = self._known.get(piece)
        if known is None:
            if self._is_byte(self._piece_to_id(piece)):
                known = bytes([int(piece[1:-1], 16)])
            else:
                known = self.decode([self._anchor, piece])[len(self._anchor) :]
            self._known[piece] = known
        return known


class SentencePieceText:
    """The text of sentencepiece's pieces.

    sentencepiece writes a run of byte pieces as the characters they spell, and U+FFFD for every byte that is
    part of none; it drops the blank in front of the very first piece.
    """

    def __init__(self, pieces: PieceTable, piece_of: Callable[[int], str | None], *, goes_on: bool) -> None:
        """Start a text.

        Args:
            pieces: of the vocabulary file.
            piece_of: the piece of a token, or a name that stands in the text as it is; None: no text.
            goes_on: the text stands behind another one, so that a blank in front of it stays.
        """
        self._pieces, self._piece_of = pieces, piece_of
        self._bytes = b""
        # Pieces since the start, as long as they have no text: only then are they decoded with those before.
        self._first: list[str] | None = None if goes_on else []

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now."""
        piece = self._piece_of(token_id)
        if piece is None:
            return ""
        inside = self._pieces[piece]
        if isinstance(inside, bytes):
            self._bytes += inside
            return self._characters(is_end=False)
        text = self._characters(is_end=True) if self._bytes else ""
        if self._first is None:
            return text + inside
        self._first.append(piece)
        first = self._pieces.decode(self._first)
        if first:
            self._first = None
        return text + first

    def finish(self) -> str:
        """Return what the last bytes become if none follows."""
        return self._characters(is_end=True)

    def _characters(self, *, is_end: bool) -> str:
        """Take the characters off the bytes; at the end of their run, all of it."""
        text = ""
        while self._bytes:
            length = _character_length(self._bytes)
            if not length and not is_end:
                break  # what is there may become a character
            text += self._bytes[:length].decode() if length > 0 else REPLACEMENT
            self._bytes = self._bytes[max(length, 1) :]
        if text:
            self._first = None
        return text


def _anchor(processor: Any) -> str:
    """Return a piece that is a word as it is written: behind it, pieces are decoded as inside a text."""
    for index in range(processor.get_piece_size()):
        piece = processor.IdToPiece(index)
        if piece.isalnum() and processor.DecodePieces([piece]) == piece:
            return piece
    raise AssertionError("the vocabulary has a letter or a digit")


def _character_length(run: bytes) -> int:
    """Return how many bytes the first character has; -1 where it is none, 0 where it may become one."""
    first = run[0]
    if first < 0x80:
        return 1
    length = 2 if first >> 5 == 0b110 else 3 if first >> 4 == 0b1110 else 4 if first >> 3 == 0b11110 else 0
    if not length or any(byte >> 6 != 0b10 for byte in run[1:length]):
        return -1
    if len(run) < length:
        return 0
    try:
        run[:length].decode()
    except UnicodeDecodeError:  # too long a form, half a surrogate pair, beyond Unicode
        return -1
    return length


def spelled(run: bytes) -> list[str]:
    r"""Return the characters that bytes spell, with U+FFFD for every byte that is part of none.

    >>> spelled("é".encode() + b"\xf0" + b"a") == ["é", "\ufffd", "a"]
    True
    """
    characters: list[str] = []
    while run:
        length = max(_character_length(run), 0)
        characters.append(run[:length].decode() if length else REPLACEMENT)
        run = run[max(length, 1) :]
    return characters


class BytesText:
    """The text of pieces that are bytes (GLM-4), and of names, which stand apart from it by blanks."""

    def __init__(self, piece_of: Callable[[int], bytes | str | None]) -> None:
        """Start a text.

        Args:
            piece_of: the bytes of a token or the name of a special one; empty where it has none, which still
                ends a run of bytes; None leaves the token out.
        """
        self._piece_of = piece_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._has_text = self._is_in_run = False

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now."""
        piece = self._piece_of(token_id)
        if piece is None:
            return ""
        if isinstance(piece, bytes):
            blank = " " if self._has_text and not self._is_in_run else ""
            self._has_text = self._is_in_run = True
            return blank + self._decoder.decode(piece)
        text = self.finish()
        self._is_in_run = False
        if piece:
            text += f" {piece}" if self._has_text else piece
            self._has_text = True
        return text

    def finish(self) -> str:
        """Return what the last bytes become if none follows."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
