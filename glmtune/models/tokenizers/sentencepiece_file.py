"""Read a sentencepiece file, and bring texts into the form that sentencepiece accepts."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from glmtune.errors import CheckpointError


def read_sentencepiece_file(path: Path) -> bytes:
    """Return the bytes of a sentencepiece file.

    Args:
        path: ``tokenizer.model`` or ``ice_text.model``.

    Raises:
        CheckpointError: the file is missing, a git-lfs pointer, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist, but the tokenizer is read from it. Download the release's "
            f"`{path.name}` into the folder of the checkpoint."
        )
    content = path.read_bytes()
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
    return content


def without_surrogates(text: str) -> str:
    r"""Join surrogate pairs that were split and replace single halves by U+FFFD.

    A Python string can hold half a pair (JSON files and cut emoji bring them); UTF-8, which sentencepiece
    reads, cannot.

    >>> without_surrogates("\ud83d\ude00") == "\U0001f600"
    True
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
