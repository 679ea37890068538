"""What the tokenizers of ChatGLM2 and ChatGLM3 share: one sentencepiece file plus named command tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER, AddedToken

from glmtune.errors import CheckpointError
from glmtune.models.chat_tokenizer import GlmTokenizer
from glmtune.models.families import Family

_TEXT_TOKENS = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>"}
_ALIASES = {"<bos>": 1, "<eos>": 2, "<unk>": 0, "<pad>": 0}
_OFFICIAL_KEYS: dict[str, object] = {
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    "do_lower_case": False,
    "remove_space": False,
    "tokenizer_class": "ChatGLMTokenizer",
}
_INTERNAL_KEYS = ("backend", "is_local", "local_files_only", "sp_model_kwargs")


class SentencePieceGlmTokenizer(GlmTokenizer):
    """A transformers tokenizer over a GLM ``tokenizer.model``.

    Ids below the number of pieces belong to sentencepiece; the command tokens follow in the order of
    ``COMMANDS``, tokens that a user adds come after those. Command tokens exist as ids only: their names
    in a text are ordinary text, so nobody can type one.

    Attributes:
        sp_model: the sentencepiece processor.
    """

    COMMANDS: ClassVar[tuple[str, ...]] = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    PREFIX: ClassVar[tuple[str, ...]] = ("[gMASK]", "sop")
    DEFAULT_FAMILY: ClassVar[Family]

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.model"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, vocab_file: str, *, glmtune_family: str | None = None, **kwargs: Any) -> None:
        """Read a sentencepiece file.

        Args:
            vocab_file: path of ``tokenizer.model``.
            glmtune_family: value of the ``Family``, where it is not the class's usual one.
            kwargs: what transformers tokenizers take (``padding_side``, ``pad_token``, ...).

        Raises:
            CheckpointError: the file is missing or no sentencepiece model, or the settings number an added
                token as one of the vocabulary.
        """
        self.family = Family(glmtune_family or self.DEFAULT_FAMILY)
        self._load(_read_model(Path(vocab_file)))
        kwargs = {**_TEXT_TOKENS, **kwargs}
        added: dict[int, AddedToken] = kwargs.pop("added_tokens_decoder", None) or {}
        kwargs["added_tokens_decoder"] = self._new_tokens(added, vocab_file)
        super().__init__(vocab_file=vocab_file, **kwargs)

    def _load(self, model_proto: bytes) -> None:
        self._model_proto = model_proto
        self.sp_model = sentencepiece.SentencePieceProcessor()
        self.sp_model.LoadFromSerializedProto(model_proto)
        pieces = self.sp_model.get_piece_size()
        self._num_pieces = pieces
        self._commands = {name: pieces + offset for offset, name in enumerate(self.COMMANDS)}
        self._blank_ids = frozenset(
            i for i in range(pieces) if self.sp_model.IsControl(i) or self.sp_model.IsUnknown(i)
        )

    def _new_tokens(self, added: dict[int, AddedToken], vocab_file: str) -> dict[int, AddedToken]:
        """Keep the tokens that are not in the vocabulary already; old files list command tokens here too."""
        new = {index: token for index, token in added.items() if not self._is_known(str(token))}
        for index, token in new.items():
            if index < self.vocab_size:
                raise CheckpointError(
                    f"{Path(vocab_file).parent / 'tokenizer_config.json'}: `added_tokens_decoder` gives "
                    f"{str(token)!r} the id {index}, but ids below {self.vocab_size} are taken by the "
                    "vocabulary. Remove the entry or give it a free id."
                )
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Leave the processor out; it is rebuilt from the file's bytes."""
        state = self.__dict__.copy()
        del state["sp_model"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the processor."""
        self.__dict__.update(state)
        self._load(state["_model_proto"])

    def __setattr__(self, key: str, value: Any) -> None:
        """Let ``pad_token_id = 2`` and the like find the token's name."""
        if key.endswith("_token_id") and isinstance(value, int) and not isinstance(value, bool):
            key, value = key.removesuffix("_id"), self._name_of(value)
        super().__setattr__(key, value)

    # ---- vocabulary ----

    @property
    def vocab_size(self) -> int:
        """Number of pieces and command tokens, without tokens a user added."""
        return self._num_pieces + len(self._commands)

    def __len__(self) -> int:
        """Number of ids in use, added tokens included."""
        return self.vocab_size + len(self._added_tokens_decoder)

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

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        count = 0
        for token in new_tokens:
            content = str(token)
            if not content or self._is_known(content) or content in self._added_tokens_encoder:
                continue
            special = special_tokens or content in self.all_special_tokens
            if isinstance(token, str):
                token = AddedToken(content, normalized=not special, special=special)
            elif special:
                token.special = True
            if special and content not in self.all_special_tokens:
                self._extra_special_tokens = [*self._extra_special_tokens, content]
            index = max([self.vocab_size - 1, *self._added_tokens_decoder]) + 1
            self._added_tokens_decoder[index] = token
            self._added_tokens_encoder[content] = index
            count += 1
        self._update_trie()
        return count

    def _update_total_vocab_size(self) -> None:
        self.total_vocab_size = len(self)

    @property
    def all_special_tokens(self) -> list[str]:
        """Names of the special tokens, command tokens included."""
        named = super().all_special_tokens
        return named + [name for name in self.COMMANDS if name not in named]

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

    @property
    def prefix_ids(self) -> list[int]:
        """The ids every input starts with."""
        return [self._commands[name] for name in self.PREFIX]

    # ---- text to ids ----

    def text_ids(self, text: str) -> list[int]:
        """Encode a text alone: no ids in front, no command token recognised.

        Args:
            text: any text; half a surrogate pair, which no file can hold, becomes U+FFFD.

        Returns:
            Ids below ``len(self)``; only sentencepiece runs unless tokens were added.
        """
        if not self._added_tokens_encoder:
            return self._piece_ids(text)
        ids: list[int] = []
        for part in self.tokens_trie.split(text):
            index = self._added_tokens_encoder.get(part)
            ids += self._piece_ids(part) if index is None else [index]
        return ids

    def _piece_ids(self, text: str) -> list[int]:
        try:
            return self.sp_model.EncodeAsIds(text)
        except (UnicodeEncodeError, RuntimeError, TypeError):  # which one depends on its version
            return self.sp_model.EncodeAsIds(_without_surrogates(text))

    def _call_ids(self, text: str) -> list[int]:
        """Encode what the user hands to ``tokenizer(text)``; ChatGLM3 may recognise role names here."""
        return self.text_ids(text)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the pieces of a text."""
        return [self._name_of(index) for index in self._call_ids(text)]

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.tokenize(text)

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_split_into_words"):
            text, text_pair = self._to_ids(text), self._to_ids(text_pair)
        return super()._encode_plus(text, text_pair, *args, **kwargs)

    def _to_ids(self, text: Any) -> Any:
        """Replace every non-empty text by its ids, keeping the nesting."""
        if isinstance(text, str):
            return self._call_ids(text) or text
        if isinstance(text, list | tuple) and text and not isinstance(text[0], int):
            return type(text)(self._to_ids(part) for part in text)
        return text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put ``[gMASK] sop`` in front; a pair is joined and closed by the end id."""
        ids = self.prefix_ids + list(token_ids_0)
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.end_id]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 for each special id of the sequence that ``build_inputs_with_special_tokens`` makes."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        mask = [1] * len(self.PREFIX) + [0] * len(token_ids_0)
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    # ---- ids to text ----

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        if skip_special_tokens and self._added_tokens_decoder:
            ids = [
                i
                for i in ids
                if i not in self._added_tokens_decoder or not self._added_tokens_decoder[i].special
            ]
        text = self._ids_to_text(ids)
        clean_up = (
            self.clean_up_tokenization_spaces
            if clean_up_tokenization_spaces is None
            else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean_up else text

    def _ids_to_text(self, ids: list[int]) -> str:
        if max(ids, default=0) < self._num_pieces:
            return self.sp_model.DecodeIds([i for i in ids if i >= 0 and i not in self._blank_ids])
        return self.convert_tokens_to_string([self.convert_ids_to_tokens(i) for i in ids])

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Join pieces; names that are no piece appear as they are."""
        return self.sp_model.DecodePieces([token for token in tokens if token])

    # ---- files ----

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write ``tokenizer.model``, byte for byte the file that was read."""
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        target.write_bytes(self._model_proto)
        return (str(target),)

    def _save_pretrained(
        self,
        save_directory: str | Any,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Bring the config that transformers wrote to the official keys, then write the vocabulary.

        The usual special tokens stay out: the released code cannot load a config that names them.
        """
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        usual = {
            **_TEXT_TOKENS,
            "added_tokens_decoder": {},
            "encode_special_tokens": False,
            "model_max_length": VERY_LARGE_INTEGER,
        }
        config = {
            key: value
            for key, value in config.items()
            if key not in _INTERNAL_KEYS and not (key in usual and value == usual[key])
        }
        config |= {**_OFFICIAL_KEYS, "glmtune_family": self.family.value}
        config_file.write_text(
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)


def _read_model(path: Path) -> bytes:
    """Return the bytes of a sentencepiece file, or say what is wrong with it."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist, but the tokenizer is read from it. Download the release's "
            "`tokenizer.model` into the folder of the checkpoint."
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
            f"tokenizers of ChatGLM2 and ChatGLM3 are.{hint} Download it again, or pass the right `family=`."
        ) from None
    return content


def _without_surrogates(text: str) -> str:
    """Join surrogate pairs that were split and replace single halves by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
