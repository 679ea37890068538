"""What the tokenizers of ChatGLM2 and ChatGLM3 share: one sentencepiece file plus named command tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import sentencepiece

from glmtune.errors import CheckpointError
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

_ALIASES = {"<bos>": 1, "<eos>": 2, "<unk>": 0, "<pad>": 0}


class SentencePieceGlmTokenizer(VocabularyTokenizer):
    """A transformers tokenizer over a GLM ``tokenizer.model``.

    Ids below the number of pieces belong to sentencepiece; the command tokens follow in the order of
    ``COMMANDS``, tokens that a user adds come after those. Command tokens exist as ids only: their names
    in a text are ordinary text, so nobody can type one.

    Attributes:
        sp_model: the sentencepiece processor.
    """

    COMMANDS: ClassVar[tuple[str, ...]] = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    PREFIX: ClassVar[tuple[str, ...]] = ("[gMASK]", "sop")
    PROCESSORS: ClassVar[tuple[str, ...]] = ("sp_model",)
    NAMED_TOKENS: ClassVar[dict[str, str]] = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>"}
    # The released code cannot load a config that names these tokens.
    USUAL_SETTINGS: ClassVar[dict[str, object]] = {**NAMED_TOKENS, "encode_special_tokens": False}

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def _read(self, path: Path) -> bytes:
        return read_sentencepiece_file(path)

    def _load(self, content: bytes) -> None:
        self.sp_model = sentencepiece.SentencePieceProcessor()
        self.sp_model.LoadFromSerializedProto(content)
        pieces = self.sp_model.get_piece_size()
        self._num_pieces = pieces
        self._commands = {name: pieces + offset for offset, name in enumerate(self.COMMANDS)}
        self._blank_ids = frozenset(
            i for i in range(pieces) if self.sp_model.IsControl(i) or self.sp_model.IsUnknown(i)
        )

    # ---- vocabulary ----

    @property
    def vocab_size(self) -> int:
        """Number of pieces and command tokens, without tokens a user added."""
        return self._num_pieces + len(self._commands)

    def get_vocab(self) -> dict[str, int]:
        """Return every token's name and id, command tokens and added tokens included."""
        vocab = {self.sp_model.IdToPiece(index): index for index in range(self._num_pieces)}
        return {**vocab, **self._commands, **self._added_tokens_encoder}

    def _name_of(self, index: int) -> str:
        if index in self._added_tokens_decoder:
            return str(self._added_tokens_decoder[index])
        if index < self._num_pieces:
            return self.sp_model.IdToPiece(index)
        return self.COMMANDS[index - self._num_pieces]

    def _is_known(self, token: str) -> bool:
        return (
            token in self._commands
            or token in _ALIASES
            or self.sp_model.IdToPiece(self.sp_model.PieceToId(token)) == token
        )

    def _convert_token_to_id(self, token: str) -> int:
        if token in self._commands:
            return self._commands[token]
        return _ALIASES.get(token, self.sp_model.PieceToId(token))

    def _convert_id_to_token(self, index: int) -> str:
        """Return a piece; like the released code, an empty text for ids that are no text."""
        if index < 0 or index >= self._num_pieces or index in self._blank_ids:
            return ""
        return self.sp_model.IdToPiece(index)

    def get_command(self, token: str) -> int:
        """Return the id of a command token such as ``[gMASK]`` or ``<|user|>``.

        Raises:
            KeyError: there is no command token of this name.
        """
        return self._commands[token] if token in self._commands else _ALIASES[token]

    @property
    def end_id(self) -> int:
        """The id that ends an answer."""
        return self.sp_model.eos_id()

    # ---- text to ids and back ----

    def _piece_ids(self, text: str) -> list[int]:
        try:
            return self.sp_model.EncodeAsIds(text)
        except (UnicodeEncodeError, RuntimeError, TypeError):  # which one depends on its version
            return self.sp_model.EncodeAsIds(without_surrogates(text))

    def _ids_to_text(self, ids: list[int]) -> str:
        if max(ids, default=0) < self._num_pieces:
            return self.sp_model.DecodeIds([i for i in ids if i >= 0 and i not in self._blank_ids])
        return self.convert_tokens_to_string([self.convert_ids_to_tokens(i) for i in ids])

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Join pieces; names that are no piece appear as they are."""
        return self.sp_model.DecodePieces([token for token in tokens if token])


def read_sentencepiece_file(path: Path) -> bytes:
    """Return the bytes of a sentencepiece file, or say what is wrong with it."""
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
    """Join surrogate pairs that were split and replace single halves by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
