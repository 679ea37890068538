"""The tokenizers of ChatGLM2 and ChatGLM3: one sentencepiece file, and command tokens numbered behind it.

The file knows nothing of the command tokens (``[gMASK]``, ``<|user|>``, ...): the released code numbers them
behind the pieces. So no text can be encoded into one, and a prompt cannot be broken by typing their names.

Source:
    ``tokenization_chatglm.py`` of THUDM/chatglm2-6b and THUDM/chatglm3-6b.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece

from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.sentencepiece_file import read_sentencepiece_file, without_surrogates
from glmtune.models.tokenizers.token_text import PieceTable, SentencePieceText, TokenText
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
"""Command tokens that open a message, in ChatGLM3 only."""
_ROLE_TOKEN = re.compile(f"({'|'.join(map(re.escape, ROLE_TOKENS))})")
_ALIASES = {"<bos>": 1, "<eos>": 2, "<unk>": 0, "<pad>": 0}
"""Names under which the released code knows pieces of the file; it has no piece for padding and takes unk."""


class SentencePieceGlmTokenizer(VocabularyTokenizer):
    """What the tokenizers of ChatGLM2 and ChatGLM3 share, over a GLM ``tokenizer.model``.

    Ids below the number of pieces belong to sentencepiece; the command tokens follow in the order of
    ``COMMANDS``, tokens that a user adds come after those.

    Attributes:
        sp_model: the sentencepiece processor.
    """

    COMMANDS: ClassVar[tuple[str, ...]] = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    PREFIX: ClassVar[tuple[str, ...]] = ("[gMASK]", "sop")
    PROCESSORS: ClassVar[tuple[str, ...]] = ("sp_model", "_pieces")
    NAMED_TOKENS: ClassVar[dict[str, str]] = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>"}
    # The released code cannot load a config that names these tokens.
    USUAL_SETTINGS: ClassVar[dict[str, object]] = {**NAMED_TOKENS, "encode_special_tokens": False}

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def _read(self, path: Path) -> bytes:
        return read_sentencepiece_file(path)

    def _load(self, content: bytes) -> None:
        self.sp_model = sentencepiece.SentencePieceProcessor()
        self.sp_model.LoadFromSerializedProto(content)
        self._pieces = PieceTable(self.sp_model)
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

    def token_text(
        self,
        *,
        skip_special_tokens: bool = False,
        left_out: Collection[int] = (),
        goes_on: bool = False,
    ) -> TokenText:
        """Return what decodes tokens one by one."""
        skipped = self._skipped(skip_special_tokens, left_out)

        def piece_of(index: int) -> str | None:
            return None if index in skipped else self.convert_ids_to_tokens(index) or None

        return SentencePieceText(self._pieces, piece_of, goes_on=goes_on)


class ChatGLM2Tokenizer(SentencePieceGlmTokenizer):
    """Tokenizer of ChatGLM2-6B, ChatGLM2-6B-32K and CodeGeeX2-6B; decoding drops command tokens."""

    DEFAULT_FAMILY = Family.CHATGLM2


class ChatGLM3Tokenizer(SentencePieceGlmTokenizer):
    """Tokenizer of ChatGLM3-6B(-32K): ChatGLM2's file and, behind its command tokens, the role tokens.

    As in the release, decoding writes the names of command tokens, also under ``skip_special_tokens``;
    cut generated ids at the template's ``stop_ids`` before decoding them.

    Attributes:
        encode_special_tokens: recognise the names of role tokens in a text given to the tokenizer. Prompt
            templates never do.
    """

    COMMANDS = (*SentencePieceGlmTokenizer.COMMANDS, *ROLE_TOKENS)
    DEFAULT_FAMILY = Family.CHATGLM3

    def __init__(self, vocab_file: str, *, encode_special_tokens: bool = False, **kwargs: Any) -> None:
        """Read a sentencepiece file.

        Args:
            vocab_file: path of ``tokenizer.model``.
            encode_special_tokens: see the class.
            kwargs: as for every tokenizer here.
        """
        self.encode_special_tokens = encode_special_tokens
        super().__init__(vocab_file, encode_special_tokens=encode_special_tokens, **kwargs)

    def _call_ids(self, text: str) -> list[int]:
        if not self.encode_special_tokens:
            return self.text_ids(text)
        ids: list[int] = []
        for part in _ROLE_TOKEN.split(text):
            ids += [self.get_command(part)] if part in ROLE_TOKENS else self.text_ids(part)
        return ids

    def _convert_id_to_token(self, index: int) -> str:
        if self._num_pieces <= index < self.vocab_size:
            return self.COMMANDS[index - self._num_pieces]
        return super()._convert_id_to_token(index)
