"""What all tokenizers here share: one vocabulary file, command tokens, and tokens that a user adds.

transformers' slow tokenizer would search every text for the names of special tokens. A GLM must not: whoever
typed ``<|system|>`` into a question would write a system message. So a subclass encodes plain text by itself
(`_piece_ids`), and the methods through which transformers 5 would split a text (`tokenize`, `_encode_plus`)
are replaced; padding, truncation, tensors and saving stay the parent's.
"""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

from transformers.tokenization_utils_base import VERY_LARGE_INTEGER, AddedToken

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family
from glmtune.models.templates.jinja_forms import CHAT_TEMPLATES
from glmtune.models.tokenizers.base import GlmTokenizer
from glmtune.models.tokenizers.token_text import TokenText

LOGGER = logging.getLogger(__name__)

_PROGRAMS = ("chat_template", "response_schema", "response_template")
"""Keys whose values other tools run: Jinja, and patterns that take answers apart."""
_INTERNAL_KEYS = (
    "backend",
    "is_local",
    "local_files_only",
    "model_specific_special_tokens",
    "sp_model_kwargs",
)
"""Keys that transformers 5 writes into tokenizer_config.json for itself; the released code refuses some."""


class VocabularyTokenizer(GlmTokenizer):
    """A transformers tokenizer over the vocabulary file of a release.

    The vocabulary and the command tokens take the ids below ``num_reserved_ids``; tokens that a user adds
    come after those and are recognised everywhere. Command tokens exist as ids: ``text_ids``, which the
    prompt templates use, never recognises their names, so nobody can type one into a prompt.
    """

    COMMANDS: ClassVar[tuple[str, ...]] = ()
    """Command tokens that are no part of the vocabulary file."""
    PREFIX: ClassVar[tuple[str, ...]] = ()
    DEFAULT_FAMILY: ClassVar[Family]
    NAMED_TOKENS: ClassVar[dict[str, str]]
    """The special tokens transformers asks for (``eos_token``, ...), where the settings name none."""
    USUAL_SETTINGS: ClassVar[dict[str, object]] = {}
    """Settings that a saved tokenizer_config.json leaves out at these values."""
    OFFICIAL_CLASS: ClassVar[str] = "ChatGLMTokenizer"
    PROCESSORS: ClassVar[tuple[str, ...]]
    """Attributes that are rebuilt from the file's bytes rather than pickled."""

    def __init__(self, vocab_file: str, *, glmtune_family: str | None = None, **kwargs: Any) -> None:
        """Read a vocabulary file.

        Args:
            vocab_file: its path.
            glmtune_family: value of the ``Family``, where it is not the class's usual one.
            kwargs: what transformers tokenizers take (``padding_side``, ``pad_token``, ...).

        Raises:
            CheckpointError: the file is missing or of another kind, or the settings number an added token as
                one of the vocabulary.
        """
        # Before the parent's constructor, which asks for size and ids of the special tokens. The bytes are
        # kept: saving writes them back as they were, and a pickle rebuilds the processor from them.
        self.family = Family(glmtune_family or self.DEFAULT_FAMILY)
        self._content = self._read(Path(vocab_file))
        self._load(self._content)
        kwargs = {**self.NAMED_TOKENS, **kwargs}
        added: dict[int, AddedToken] = kwargs.pop("added_tokens_decoder", None) or {}
        kwargs["added_tokens_decoder"] = self._new_tokens(added, vocab_file)
        super().__init__(vocab_file=vocab_file, **kwargs)
        # As it came with the files. It is a program, which other tools run; `_is_copied` decides on it.
        self._received_template = self.chat_template
        self.keeps_chat_template = False

    # ---- what each vocabulary brings ----

    @abstractmethod
    def _read(self, path: Path) -> bytes:
        """Return the bytes of the file, or raise CheckpointError."""

    @abstractmethod
    def _load(self, content: bytes) -> None:
        """Build the processor from the file's bytes."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids as the release counts them, without tokens a user added."""

    @property
    def num_reserved_ids(self) -> int:
        """Number of ids of vocabulary and command tokens."""
        return self.vocab_size

    @abstractmethod
    def _piece_ids(self, text: str) -> list[int]:
        """Encode a text in which no token is recognised by its name."""

    @abstractmethod
    def _name_of(self, index: int) -> Any:
        """Return the piece or the command token of an id."""

    @abstractmethod
    def _is_known(self, token: str) -> bool:
        """Whether a token belongs to the vocabulary or the command tokens."""

    @abstractmethod
    def _ids_to_text(self, ids: list[int]) -> str:
        """Decode ids."""

    def _official_keys(self) -> dict[str, object]:
        """Return what the release writes into tokenizer_config.json whatever the settings."""
        return {
            "auto_map": {"AutoTokenizer": [f"tokenization_chatglm.{self.OFFICIAL_CLASS}", None]},
            "do_lower_case": False,
            "remove_space": False,
            "tokenizer_class": self.OFFICIAL_CLASS,
        }

    def _new_tokens(self, added: dict[int, AddedToken], vocab_file: str) -> dict[int, AddedToken]:
        """Keep the tokens that are not in the vocabulary already; old files list command tokens here too."""
        new = {index: token for index, token in added.items() if not self._is_known(str(token))}
        for index, token in new.items():
            if index < self.num_reserved_ids:
                raise CheckpointError(
                    f"{Path(vocab_file).parent / 'tokenizer_config.json'}: `added_tokens_decoder` gives "
                    f"{str(token)!r} the id {index}, but ids below {self.num_reserved_ids} are taken by the "
                    "vocabulary. Remove the entry or give it a free id."
                )
        return new

    def __getstate__(self) -> dict[str, Any]:
        """Leave the processor out; it is rebuilt from the file's bytes."""
        return {key: value for key, value in self.__dict__.items() if key not in self.PROCESSORS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the processor."""
        vars(self).update(state)
        self._load(state["_content"])

    def __setattr__(self, key: str, value: Any) -> None:
        """Let ``pad_token_id = 2`` and the like find the token's name.

        transformers asks `convert_ids_to_tokens`, which here, as in the releases, is empty for command
        tokens.
        """
        if key.endswith("_token_id") and isinstance(value, int) and not isinstance(value, bool):
            key, value = key.removesuffix("_id"), self._name_of(value)
        super().__setattr__(key, value)

    # ---- vocabulary ----

    def __len__(self) -> int:
        """Number of ids in use, added tokens included."""
        return self.num_reserved_ids + len(self._added_tokens_decoder)

    # transformers calls this for `add_tokens`. Its own version numbers new tokens from `len(get_vocab())`,
    # which need not be a free id (pieces may share a name), and lists command tokens as added ones.
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
            index = max([self.num_reserved_ids - 1, *self._added_tokens_decoder]) + 1
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

    @property
    def command_names(self) -> tuple[str, ...]:
        """Names of the command tokens, wherever their ids lie."""
        return self.COMMANDS

    @property
    def prefix_ids(self) -> list[int]:
        """The ids every input starts with."""
        return [self.get_command(name) for name in self.PREFIX]

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

    def _call_ids(self, text: str) -> list[int]:
        """Encode what the user hands to ``tokenizer(text)``; some releases recognise token names here."""
        return self.text_ids(text)

    def tokenize(self, text: str, **kwargs: Any) -> list[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the pieces of a text."""
        encode = self._encoder(kwargs.get("split_special_tokens"))
        return [self._name_of(index) for index in encode(text)]

    def _tokenize(self, text: str, **kwargs: Any) -> list[Any]:
        return self.tokenize(text)

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The parent takes ids as they are, so it is given ids and never splits a text itself.
        if not kwargs.get("is_split_into_words"):
            encode = self._encoder(kwargs.get("split_special_tokens"))
            text, text_pair = _to_ids(text, encode), _to_ids(text_pair, encode)
        return super()._encode_plus(text, text_pair, *args, **kwargs)

    def _encoder(self, split_special_tokens: bool | None) -> Callable[[str], list[int]]:
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        return self.text_ids if split else self._call_ids

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put the prefix ids in front and the suffix ids behind; a pair is closed by the end id."""
        ids = [*self.prefix_ids, *token_ids_0, *self.suffix_ids]
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
        mask = [1] * len(self.prefix_ids) + [0] * len(token_ids_0) + [1] * len(self.suffix_ids)
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    # ---- ids to text ----

    @property
    def _ids_to_skip(self) -> set[int]:
        """The ids that ``skip_special_tokens`` leaves out."""
        return {index for index, token in self._added_tokens_decoder.items() if token.special}

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        text = self._ids_to_text(self._kept_ids(token_ids, skip_special_tokens))
        return self._cleaned(text, clean_up_tokenization_spaces)

    def _kept_ids(self, token_ids: int | list[int], skip_special_tokens: bool) -> list[int]:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        if skip_special_tokens and (skipped := self._ids_to_skip):
            ids = [index for index in ids if index not in skipped]
        return ids

    def _cleaned(self, text: str, clean_up: bool | None) -> str:
        wanted = self.clean_up_tokenization_spaces if clean_up is None else clean_up
        return self.clean_up_tokenization(text) if wanted else text

    @abstractmethod
    def token_text(
        self,
        *,
        skip_special_tokens: bool = False,
        left_out: Collection[int] = (),
        goes_on: bool = False,
    ) -> TokenText:
        """Return what decodes tokens one by one; joined, its texts are those of `decode`.

        Args:
            skip_special_tokens: as for `decode`.
            left_out: more tokens that are no text.
            goes_on: the text stands behind another one, so that a blank in front of it stays.
        """

    def _skipped(self, skip_special_tokens: bool, left_out: Collection[int]) -> frozenset[int]:
        return frozenset(left_out) | (self._ids_to_skip if skip_special_tokens else set())

    # ---- files ----

    def _is_copied(self) -> bool:
        """Whether the chat template is saved: one that came with the files only if ours or asked for."""
        template = self.chat_template
        is_own = template != self._received_template or template == CHAT_TEMPLATES.get(self.family)
        return template is None or is_own or self.keeps_chat_template

    # transformers 5 calls this in `save_pretrained`, before it writes tokenizer_config.json.
    def save_chat_templates(
        self, save_directory: Any, tokenizer_config: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """Write the chat template, unless it is a stranger's: see `load_tokenizer_folder`."""
        if self._is_copied():
            return super().save_chat_templates(save_directory, tokenizer_config, *args, **kwargs)
        if not getattr(self, "_has_said_so", False):  # a run saves many times
            LOGGER.warning(
                "The chat template of %s is not copied on: it is a program that other tools run. "
                "`keep_chat_template=true` copies it.",
                self.name_or_path,
            )
            self._has_said_so = True
        return {key: value for key, value in tokenizer_config.items() if key != "chat_template"}, []

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the vocabulary file, byte for byte the one that was read."""
        name = self.vocab_files_names["vocab_file"]
        target = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        target.write_bytes(self._content)
        return (str(target),)

    def _save_pretrained(
        self,
        save_directory: str | Any,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """Bring the config that transformers wrote to the official keys, then write the vocabulary.

        transformers 5 calls this at the end of `save_pretrained`. The released code must be able to load the
        folder too, so keys are those of the release, and settings at their usual value are left out.
        """
        config_file = Path(file_names[0])
        config = json.loads(config_file.read_text(encoding="utf-8"))
        usual = {
            **self.USUAL_SETTINGS,
            "added_tokens_decoder": {},
            "model_max_length": VERY_LARGE_INTEGER,
        }
        config = {
            key: value
            for key, value in config.items()
            if key not in (*_INTERNAL_KEYS, *(() if self._is_copied() else _PROGRAMS))
            and not (key in usual and value == usual[key])
        }
        config |= {**self._official_keys(), "glmtune_family": self.family.value}
        config_file.write_text(
            json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)


def _to_ids(text: Any, encode: Callable[[str], list[int]]) -> Any:
    """Replace every non-empty text by its ids, keeping the nesting."""
    if isinstance(text, str):
        return encode(text) or text
    if isinstance(text, list | tuple) and text and not isinstance(text[0], int):
        return type(text)(_to_ids(part, encode) for part in text)
    return text
