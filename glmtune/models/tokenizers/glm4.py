"""The tokenizer of GLM-4: byte-pair ranks read by tiktoken, and special tokens numbered after them.

A piece is a sequence of bytes, often part of a character, so names of pieces are ``bytes`` and only runs of
them can be decoded. tiktoken is given no special tokens: it would find their names in any text.

Source:
    ``tokenization_chatglm.py`` of THUDM/glm-4-9b-chat.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from transformers.tokenization_utils_base import AddedToken

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.sentencepiece_file import read_vocabulary
from glmtune.models.tokenizers.token_text import BytesText, TokenText
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""How a text is cut before pairs are merged; belongs to the ranks as much as the file does."""


class ChatGLM4Tokenizer(VocabularyTokenizer):
    """Tokenizer of GLM-4-9B(-chat); ``[gMASK] <sop>`` stand in front of the text.

    Pieces are ``bytes``: a piece may be part of a character. As in the release the names of special tokens
    are recognised in a text given to the tokenizer, but never by ``text_ids``, which the templates use.

    Attributes:
        encoding: the tiktoken encoding of the ranks, without special tokens.
    """

    COMMANDS: ClassVar[tuple[str, ...]] = (
        "<|endoftext|>",
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
    )
    PREFIX: ClassVar[tuple[str, ...]] = ("[gMASK]", "<sop>")
    DEFAULT_FAMILY = Family.GLM4
    OFFICIAL_CLASS: ClassVar[str] = "ChatGLM4Tokenizer"
    PROCESSORS: ClassVar[tuple[str, ...]] = ("encoding", "_ranks")
    USUAL_SETTINGS: ClassVar[dict[str, object]] = {"extra_special_tokens": list(COMMANDS)}
    NAMED_TOKENS: ClassVar[dict[str, str]] = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def _read(self, path: Path) -> bytes:
        if not path.is_file():
            raise CheckpointError(
                f"{path} does not exist, but the tokenizer is read from it. Download the release's "
                "`tokenizer.model` into the folder of the checkpoint."
            )
        content = read_vocabulary(path)
        _read_ranks(content, path)
        return content

    def _load(self, content: bytes) -> None:
        import tiktoken  # no other generation needs it

        ranks = _read_ranks(content, Path("tokenizer.model"))
        self.encoding = tiktoken.Encoding("glm4", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
        self._ranks = ranks
        self._commands = {name: len(ranks) + offset for offset, name in enumerate(self.COMMANDS)}

    def _new_tokens(self, added: dict[int, AddedToken], vocab_file: str) -> dict[int, AddedToken]:
        for index, token in added.items():
            expected = self._commands.get(str(token), index)
            if index != expected:
                raise CheckpointError(
                    f"{Path(vocab_file).parent / 'tokenizer_config.json'}: `added_tokens_decoder` gives "
                    f"{str(token)!r} the id {index}, but special tokens follow the {self.vocab_size} ranks "
                    f"of {Path(vocab_file).name}, so it is {expected}. The files are of different releases, "
                    "or the ranks are not complete: download both again."
                )
        return super()._new_tokens(added, vocab_file)

    # ---- vocabulary ----

    @property
    def vocab_size(self) -> int:
        """Number of ranks, without special tokens."""
        return len(self._ranks)

    @property
    def num_reserved_ids(self) -> int:
        """Number of ranks and special tokens."""
        return len(self._ranks) + len(self._commands)

    def get_vocab(self) -> dict[Any, int]:
        """Return every piece (bytes), special token and added token with its id."""
        return {**self._ranks, **self._commands, **self._added_tokens_encoder}

    def _name_of(self, index: int) -> str | bytes:
        if index in self._added_tokens_decoder:
            return str(self._added_tokens_decoder[index])
        if index < self.vocab_size:
            return self.encoding.decode_single_token_bytes(index)
        return self.COMMANDS[index - self.vocab_size]

    def _is_known(self, token: str) -> bool:
        return token in self._commands or token.encode() in self._ranks

    def _convert_token_to_id(self, token: str | bytes) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(token, str):
            return self._commands[token] if token in self._commands else self._ranks.get(token.encode())
        return self._ranks.get(token)

    def _convert_id_to_token(self, index: int) -> str | bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._name_of(index) if 0 <= index < self.num_reserved_ids else ""

    def get_command(self, token: str) -> int:
        """Return the id of a special token such as ``[gMASK]`` or ``<|user|>``.

        Raises:
            KeyError: there is no special token of this name.
        """
        return self._commands[token]

    @property
    def end_id(self) -> int:
        """The id that ends an answer: ``<|endoftext|>``."""
        return self._commands["<|endoftext|>"]

    # ---- text to ids and back ----

    def _piece_ids(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def _call_ids(self, text: str) -> list[int]:
        # The release recognises names of special tokens in `tokenizer(text)`, and so programs written for it
        # expect; templates go through `text_ids`, which does not.
        ids: list[int] = []
        for part in _COMMAND.split(text):
            ids += [self._commands[part]] if part in self._commands else self.text_ids(part)
        return ids

    @property
    def _ids_to_skip(self) -> set[int]:
        return super()._ids_to_skip | set(self._commands.values())

    def _ids_to_text(self, ids: list[int], separator: str = " ") -> str:
        """Decode ids; as transformers did for the release, blanks surround special tokens."""
        names = [self.convert_ids_to_tokens(index) for index in ids]
        return separator.join(_joined(names))

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        spaces_between_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str:
        ids = self._kept_ids(token_ids, skip_special_tokens)
        text = self._ids_to_text(ids, " " if spaces_between_special_tokens else "")
        return self._cleaned(text, clean_up_tokenization_spaces)

    def token_text(
        self,
        *,
        skip_special_tokens: bool = False,
        left_out: Collection[int] = (),
        goes_on: bool = False,
    ) -> TokenText:
        """Return what decodes tokens one by one; a blank in front always stays."""
        skipped = self._skipped(skip_special_tokens, left_out)

        def piece_of(index: int) -> bytes | str | None:
            return None if index in skipped else self.convert_ids_to_tokens(index)

        return BytesText(piece_of)

    def convert_tokens_to_string(self, tokens: Sequence[str | bytes]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Join pieces; bytes that are no character become U+FFFD, names of special tokens stay."""
        return "".join(_joined(tokens))

    def _official_keys(self) -> dict[str, object]:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        tokens = {str(index): {"content": name, **flags} for name, index in self._commands.items()}
        tokens |= {str(index): token.__getstate__() for index, token in self._added_tokens_decoder.items()}
        names = list(self.COMMANDS)
        named = {"eos_token": str(self.eos_token), "pad_token": str(self.pad_token)}
        return {
            **super()._official_keys(),
            **named,
            "added_tokens_decoder": tokens,
            "additional_special_tokens": names,
        }


_COMMAND = re.compile(f"({'|'.join(map(re.escape, ChatGLM4Tokenizer.COMMANDS))})")


def _joined(tokens: Sequence[Any]) -> list[str]:
    """Decode runs of bytes, and keep names apart."""
    parts: list[str] = []
    for kind, group in groupby(tokens, type):
        run = list(group)
        parts += [b"".join(run).decode("utf-8", "replace")] if kind is bytes else run
    return [part for part in parts if part]


def _read_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """Return piece → rank; each line holds a piece in base64 and its rank.

    Raises:
        CheckpointError: a line of another form, or ranks that do not count from 0 without a gap.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            hint = (
                " It is a git-lfs pointer: run `git lfs pull`."
                if line.startswith(b"version https://")
                else ""
            )
            raise CheckpointError(
                f"{path}, line {number}: {line[:40]!r} is no piece in base64 with its rank, but the "
                f"tokenizer of GLM-4 is a file of such lines.{hint} Download it again, or pass the "
                "right `family=`."
            ) from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(
            f"{path} holds {len(ranks)} pieces, but their ranks do not count from 0 to {len(ranks) - 1}: "
            "lines are missing. Download the file again."
        )
    return ranks
