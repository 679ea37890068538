"""Read a sentencepiece file, and bring texts into the form that sentencepiece accepts.

The file is a protocol buffer: pieces first (130,344 in ChatGLM-6B's), then the settings of training, then
those of normalization. Such a format has no length and no end mark, so a file that is cut between two entries
is a whole one with fewer pieces, and every id behind them is another token's.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from glmtune.errors import CheckpointError

MAX_BYTES = 64 * 2**20
"""Of a vocabulary file; the largest of a release has 2.7 MB."""
PIECES, TRAINER, NORMALIZER = 1, 2, 3
"""Numbers of the entries that every file has, as sentencepiece writes them: in this order."""


def read_sentencepiece_file(path: Path) -> bytes:
    """Return the bytes of a sentencepiece file.

    Args:
        path: ``tokenizer.model`` or ``ice_text.model``.

    Raises:
        CheckpointError: the file is missing, cut, a git-lfs pointer, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist, but the tokenizer is read from it. Download the release's "
            f"`{path.name}` into the folder of the checkpoint."
        )
    content = read_vocabulary(path)
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(content)
    except RuntimeError:
        hint = (
            " It is a git-lfs pointer: run `git lfs pull`."
            if content.startswith(b"version https://git-lfs")
            else ""
        )
        raise CheckpointError(
            f"{path} ({len(content)} bytes, starts with {content[:16]!r}) is no sentencepiece model, but the "
            f"tokenizers of ChatGLM-6B, ChatGLM2 and ChatGLM3 are.{hint} Download it again, or pass the "
            "right `family=`."
        ) from None
    kinds = _entry_kinds(content)
    if kinds != sorted(kinds) or not {PIECES, TRAINER, NORMALIZER} <= set(kinds):
        raise CheckpointError(
            f"{path} ({len(content)} bytes) is not complete: it has {kinds.count(PIECES)} pieces but not, "
            "behind them, the settings of training and normalization with which every file of sentencepiece "
            "ends. The download stopped early, and ids would be those of other tokens; fetch it again."
        )
    return content


def read_vocabulary(path: Path) -> bytes:
    """Return the bytes of a vocabulary file.

    Raises:
        CheckpointError: it cannot be read, or is far larger than any release's.
    """
    try:
        size = path.stat().st_size
        if size <= MAX_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from None
    raise CheckpointError(
        f"{path} has {size} bytes, but vocabularies have at most {MAX_BYTES}. Fetch the release's file again."
    )


def _entry_kinds(content: bytes) -> list[int]:
    """Return the numbers of a protocol buffer's entries; sentencepiece has read it, so it is well formed."""
    kinds: list[int] = []
    place = 0

    def number() -> int:  # seven bits a byte, lowest first, until one whose highest bit is not set
        nonlocal place
        value = shift = 0
        while True:
            byte = content[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < len(content):
        key = number()
        kinds.append(key >> 3)
        # The low three bits tell the form of what follows: a number, 8 bytes, a length and as many bytes, 4.
        form = key & 7
        if form == 2:
            length = number()  # moves `place`, too
            place += length
        elif form == 0:
            number()
        else:
            place += 8 if form == 1 else 4
    return kinds


def without_surrogates(text: str) -> str:
    r"""Join surrogate pairs that were split and replace single halves by U+FFFD.

    A Python string can hold half a pair (JSON files and cut emoji bring them); UTF-8, which sentencepiece
    reads, cannot.

    >>> without_surrogates("\ud83d\ude00") == "\U0001f600"
    True
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
