"""Any tokenizer that is stored as ``tokenizer.json``, by the library that transformers itself uses for it.

Special tokens are recognised only where a template wrote them: in a text they are text. Tokens that a user
added are in the file, too, and are recognised everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Tokenizer
from transformers.tokenization_utils_base import AddedToken

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family
from glmtune.models.templates.thinking import CLOSE, OPEN
from glmtune.models.tokenizers.sentencepiece_file import without_surrogates
from glmtune.models.tokenizers.token_text import REPLACEMENT, TokenText, spelled
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

MAX_BYTES = 512 * 2**20
"""Of a file; those of GLM-4 have 20 MB."""
MAX_HELD = 3
"""Bytes of a character that is not complete, and so most of the characters that stand for them."""
MAX_WAITING = 8
"""Tokens that are decoded anew with every new one, where no character is complete."""
RELEASE_FILE = "tokenizer.model"
"""What the vocabulary files of ChatGLM2 and all later releases are called."""
ADDED_KEY = "glmtune_added_tokens"
"""Key of tokenizer_config.json: which tokens a user added to the release's, in an export."""
_OLD_NAMES = {"sop": "<sop>", "eop": "<eop>"}
"""Names that our templates use → names that exports have, as the bare ones are parts of words."""


class JsonTokenizer(VocabularyTokenizer):
    """Tokenizer of a folder in transformers' format.

    An export of an official checkpoint has the vocabulary file of its release beside tokenizer.json. Nothing
    is read of it, but it is written wherever the tokenizer is, so that the way back to the official format
    stays open.

    Attributes:
        processor: of the `tokenizers` library.
        release_file: bytes of that vocabulary file; None where there is none.
        user_names: tokens of the file that a user had added before it was written, as an export says.
    """

    release_file: bytes | None = None

    DEFAULT_FAMILY = Family.TRANSFORMERS
    OFFICIAL_CLASS: ClassVar[str] = "PreTrainedTokenizerFast"
    PROCESSORS: ClassVar[tuple[str, ...]] = ("processor",)
    NAMED_TOKENS: ClassVar[dict[str, str]] = {}

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "tokenizer.json"}  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        """Read a tokenizer.json.

        Args:
            vocab_file: its path.
            kwargs: as for every tokenizer here; ``glmtune_added_tokens`` names tokens of the file that a user
                added, so that even special ones are found in every text.

        Raises:
            CheckpointError: the file is missing or of another kind.
        """
        added = kwargs.get(ADDED_KEY) or []
        if not isinstance(added, list) or not all(isinstance(name, str) for name in added):
            raise CheckpointError(
                f"{Path(vocab_file).parent / 'tokenizer_config.json'}: `{ADDED_KEY}` is {str(added)[:80]}, "
                "but it must be a list of names. Export the model again."
            )
        self.user_names: frozenset[str] = frozenset(added)
        super().__init__(vocab_file, **kwargs)

    def _read(self, path: Path) -> bytes:
        if not path.is_file():
            raise CheckpointError(
                f"{path} does not exist, but the tokenizer is read from it. Download it again."
            )
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, but at most {MAX_BYTES} are read."
            )
        content = path.read_bytes()
        beside = path.with_name(RELEASE_FILE)
        if self.family is not Family.TRANSFORMERS and beside.is_file():
            self.release_file = beside.read_bytes() if beside.stat().st_size <= MAX_BYTES else None
        try:
            Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
            raise CheckpointError(
                f"{path} is no tokenizer ({str(error)[:200]}). Download it again."
            ) from error
        return content

    def _load(self, content: bytes) -> None:
        self.processor = Tokenizer.from_str(content.decode("utf-8"))
        added = self.processor.get_added_tokens_decoder()
        special = {token.content: index for index, token in added.items() if token.special}
        self._special_ids = frozenset(special.values())
        self._special = {name: index for name, index in special.items() if name not in self.user_names}
        self.COMMANDS = tuple(self._special)  # pyright: ignore[reportAttributeAccessIssue]
        # Special, and yet looked for in texts: those that a user added.
        self._found = {name: index for name, index in special.items() if name in self.user_names}
        longest_first = sorted(self._found, key=len, reverse=True)
        self._finder = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if self._found else None
        self._num_ids = max(self.processor.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        inner = self.processor.encode("a", add_special_tokens=False).ids
        whole = self.processor.encode("a", add_special_tokens=True).ids
        start = next((at for at in range(len(whole)) if whole[at : at + len(inner)] == inner), 0)
        self._before, self._after = whole[:start], whole[start + len(inner) :]
        vocabulary = self.processor.get_vocab(with_added_tokens=False)
        # Pieces that are single bytes, as sentencepiece has them.
        self._bytes = {
            vocabulary[name]: byte for byte in range(256) if (name := f"<0x{byte:02X}>") in vocabulary
        }
        self.processor.encode_special_tokens = True  # from here on their names in a text are text

    # ---- vocabulary ----

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens and those that users added included."""
        return self._num_ids

    def get_vocab(self) -> dict[str, int]:
        """Return every token's name and id."""
        return {**self.processor.get_vocab(with_added_tokens=True), **self._added_tokens_encoder}

    def _name_of(self, index: int) -> str:
        if index in self._added_tokens_decoder:
            return str(self._added_tokens_decoder[index])
        return self.processor.id_to_token(index) or ""

    def _is_known(self, token: str) -> bool:
        return self.processor.token_to_id(token) is not None

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        # Found as they are written: a normalizer may put a blank in front of them, as of every text.
        exact = [
            AddedToken(str(token), normalized=False, special=bool(getattr(token, "special", False)))
            for token in new_tokens
        ]
        return super()._add_tokens(exact, special_tokens)

    def _convert_token_to_id(self, token: str) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.processor.token_to_id(_OLD_NAMES.get(token, token))

    def _convert_id_to_token(self, index: int) -> str:
        return self._name_of(index)

    def get_command(self, token: str) -> int:
        """Return the id of a special token such as ``[gMASK]`` or ``<|user|>``.

        Raises:
            KeyError: there is no special token of this name.
        """
        return self._special[token] if token in self._special else self._special[_OLD_NAMES[token]]

    @property
    def prefix_ids(self) -> list[int]:
        """The ids that the file puts in front of a text."""
        return list(self._before)

    @property
    def suffix_ids(self) -> list[int]:
        """The ids that the file puts behind a text."""
        return list(self._after)

    @property
    def end_id(self) -> int:
        """The id that ends an answer: of ``eos_token``.

        Raises:
            CheckpointError: tokenizer_config.json names none.
        """
        found: Any = self.eos_token_id
        if not isinstance(found, int):
            raise CheckpointError(
                f"{self.name_or_path or 'The folder'}: tokenizer_config.json names no `eos_token` that the "
                "vocabulary has, so nothing tells where an answer ends. Add it."
            )
        return found

    # ---- text to ids and back ----

    def _piece_ids(self, text: str) -> list[int]:
        if self._finder is None:
            return self._text_ids(text)
        ids: list[int] = []
        for place, part in enumerate(self._finder.split(text)):
            ids += [self._found[part]] if place % 2 else self._text_ids(part)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        try:
            return self.processor.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):  # half a surrogate pair
            return self.processor.encode(without_surrogates(text), add_special_tokens=False).ids

    @property
    def _ids_to_skip(self) -> set[int]:
        # Tags of thoughts are read by whoever parts them from the answer, also where they are special tokens.
        tags = {self._special[tag] for tag in (OPEN, CLOSE) if tag in self._special}
        return (super()._ids_to_skip | self._special_ids) - tags

    def _ids_to_text(self, ids: list[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for index in ids:
            if index in self._added_tokens_decoder:  # added since the file was read, which knows it not
                parts += [self._run_text(run, goes_on=bool(parts)), str(self._added_tokens_decoder[index])]
                run = []
            else:
                run.append(index)
        return "".join([*parts, self._run_text(run, goes_on=bool(parts))])

    def _run_text(self, ids: list[int], *, goes_on: bool) -> str:
        if not ids:
            return ""
        before = self._text_ids("a") if goes_on else []  # behind a text, a blank in front stays
        known = self._decoded(before) if before else ""
        return self._decoded([*before, *ids])[len(known) :]

    def _decoded(self, ids: list[int]) -> str:
        """Decode ids of the file, as a text of its own."""
        if self._bytes.keys().isdisjoint(ids):
            return self.processor.decode(ids, skip_special_tokens=False)
        # The library makes a run of bytes wholly unreadable where one of them is part of no character;
        # sentencepiece, and so the release that was exported, only that one.
        tokens: list[str] = []
        run = b""
        for index in ids:
            if index in self._bytes:
                run += bytes([self._bytes[index]])
                continue
            tokens += [*spelled(run), *([name] if (name := self.processor.id_to_token(index)) else [])]
            run = b""
        decoder: Any = self.processor.decoder
        return str(decoder.decode([*tokens, *spelled(run)]))

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Join tokens as `decode` does."""
        return self._ids_to_text(
            [index for token in tokens if (index := self.get_vocab().get(token)) is not None]
        )

    def token_text(
        self,
        *,
        skip_special_tokens: bool = False,
        left_out: Collection[int] = (),
        goes_on: bool = False,
    ) -> TokenText:
        """Return what decodes tokens one by one."""
        return _WindowText(self, self._skipped(skip_special_tokens, left_out), goes_on=goes_on)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write tokenizer.json byte for byte, and the release's file if there is one."""
        files = super().save_vocabulary(save_directory, filename_prefix)
        if self.release_file is None:
            return files
        target = Path(save_directory) / RELEASE_FILE
        target.write_bytes(self.release_file)
        return (*files, str(target))

    def _is_copied(self) -> bool:
        # Without its template a tuned folder of this format could not chat, or be loaded for it again.
        return True

    def _official_keys(self) -> dict[str, object]:
        return {"tokenizer_class": self.OFFICIAL_CLASS}


class _WindowText:
    """Decodes the last tokens with and without the newest one; what that adds is the newest one's text.

    The vocabulary's own decoder may do anything with a run of tokens, so runs are given to it: from the last
    place where the text was certain on, with the few tokens before it, which decide about a blank in between.
    Only a character's bytes can still change what was decoded: its replacements, three at most, are held.
    """

    def __init__(self, tokenizer: JsonTokenizer, skipped: frozenset[int], *, goes_on: bool) -> None:
        self._tokenizer, self._skipped = tokenizer, skipped
        # Behind another text a leading blank stays: as behind a token that is one.
        self._before: list[int] = tokenizer.text_ids("a") if goes_on else []
        self._waiting: list[int] = []
        self._num_given = 0  # characters of the waiting tokens' text

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now."""
        if token_id in self._skipped:
            return ""
        self._waiting.append(token_id)
        text = self._new_text()
        num_held = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_HELD)
        new = text[self._num_given : len(text) - num_held]
        if text and not num_held:
            self._before, self._waiting, self._num_given = self._waiting, [], 0
            return new
        self._num_given += len(new)
        if len(self._waiting) > MAX_WAITING:
            self._shorten(text)
        return new

    def finish(self) -> str:
        """Return what the last tokens become if none follows."""
        text = self._new_text()[self._num_given :]
        self._before, self._waiting, self._num_given = self._waiting, [], 0
        return text

    def _shorten(self, text: str) -> None:
        """Let the oldest waiting tokens go, up to a place between two characters that were given."""
        for place in range(len(self._waiting) - MAX_HELD - 1, 0, -1):
            known: str = self._new_text(place)
            if len(known) <= self._num_given and text.startswith(known):
                rest = self._waiting[place:]
                self._before, self._waiting = self._waiting[:place], rest
                self._num_given -= len(known)
                return

    def _new_text(self, num_waiting: int | None = None) -> str:
        known = str(self._tokenizer.decode(self._before)) if self._before else ""
        whole = str(self._tokenizer.decode([*self._before, *self._waiting[:num_waiting]]))
        return whole[len(known) :]
