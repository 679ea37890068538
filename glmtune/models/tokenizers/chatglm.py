r"""The tokenizer of ChatGLM-6B: a sentencepiece unigram file with pieces for line breaks, tabs and blanks.

sentencepiece drops line breaks and runs of blanks, which code and poems need. So the release writes them as
pieces of their own before it encodes a text (``\n`` as ``<n>``, eight blanks as ``<|blank_8|>``) and turns
them back after decoding.

Source:
    ``tokenization_chatglm.py`` of THUDM/chatglm-6b, up to its last revision and as of March 2023.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sentencepiece
from transformers.utils.generic import PaddingStrategy

from glmtune.errors import CheckpointError, ConfigError
from glmtune.models.releases.families import Family, read_json
from glmtune.models.tokenizers.sentencepiece_file import read_sentencepiece_file, without_surrogates
from glmtune.models.tokenizers.token_text import PieceTable, SentencePieceText, TokenText
from glmtune.models.tokenizers.unigram_ties import TieBreaker
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer
from glmtune.storage.json_files import shown

# In the order of the final vocabulary file: ids of the early releases, whose file lacks them, follow from it.
_CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_LINE_BREAK, _TAB = "<n>", "<|tab|>"
_LONGEST_BLANK = 80  # blanks of the longest such piece; a longer run becomes several
_BLANKS = re.compile(f" {{2,{_LONGEST_BLANK}}}")
_WHITESPACE_PIECE = re.compile(r"<n>|<\|tab\|>|<\|blank_([2-9]|[1-7]\d|80)\|>")
_WHITESPACE_BEGINS = re.compile(
    r"<(n?|\|(t?|ta|tab)\|?|\|(b?|bl|bla|blan|blank_?|blank_\d{1,2}\|?))\Z", re.ASCII
)
"""The end of a text to which something may be missing of such a piece's name."""
_IMAGE_TOKEN = re.compile(r"<image_(\d+)>")
MAX_IMAGE_TOKENS = 2**20
_FIXED_TOKENS = {"gmask_token": "[gMASK]", "end_token": "</s>", "eop_token": "<eop>"}
"""Settings of the released tokenizer_config.json whose values the released prompts take for granted."""


class ChatGLMTokenizer(VocabularyTokenizer):
    """Tokenizer of ChatGLM-6B; ``[gMASK] <sop>`` stand behind the text.

    As in the release the names of ``bos_token``, ``eos_token``, ``unk_token``, ``pad_token`` and
    ``mask_token`` are recognised in a text given to the tokenizer, blanks around them are dropped, and other
    command names are text. Ids below ``num_image_tokens`` belong to image tokens, which the releases before
    April 2023 put in front of the vocabulary (20000); those releases keep the command pieces out of the file,
    so they are added to it in memory.

    Attributes:
        sp_model: the sentencepiece processor; its ids start at 0.
        num_image_tokens: what is added to its ids.
        prefix_lm_mask: make padding return the masks and positions of the release, see `_pad`. Code written
            for the release reads them; our model needs neither, as it derives both from the ids.
    """

    DEFAULT_FAMILY = Family.CHATGLM
    PROCESSORS: ClassVar[tuple[str, ...]] = ("sp_model", "_ties", "_pieces")
    NAMED_TOKENS: ClassVar[dict[str, str]] = {
        "bos_token": "<sop>",
        "eos_token": "<eop>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "[MASK]",
    }
    USUAL_SETTINGS: ClassVar[dict[str, object]] = {"prefix_lm_mask": False}

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": "ice_text.model"}  # pyright: ignore[reportIncompatibleVariableOverride]
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        vocab_file: str,
        *,
        num_image_tokens: int | None = None,
        prefix_lm_mask: bool = False,
        do_lower_case: bool = False,
        remove_space: bool = False,
        **kwargs: Any,
    ) -> None:
        """Read a sentencepiece file.

        Args:
            vocab_file: path of ``ice_text.model``.
            num_image_tokens: ids in front of the text vocabulary; None (tokenizer_config.json before April
                2023 does not say) reads it off config.json beside the vocabulary.
            prefix_lm_mask: see the class.
            do_lower_case: write texts in lower case before encoding them.
            remove_space: reduce white space to single blanks before encoding.
            kwargs: as for every tokenizer here.

        Raises:
            CheckpointError: as for every tokenizer here; also settings that rename a token of the vocabulary,
                and a config.json beside it that belongs to another vocabulary.
        """
        if num_image_tokens is None:
            num_image_tokens = _image_tokens_of_config(Path(vocab_file))
        if not isinstance(num_image_tokens, int) or not 0 <= num_image_tokens <= MAX_IMAGE_TOKENS:
            raise CheckpointError(
                f"{Path(vocab_file).parent / 'tokenizer_config.json'}: `num_image_tokens` is "
                f"{shown(num_image_tokens)}, but it must be a whole number from 0 (20000 before April 2023) "
                f"to {MAX_IMAGE_TOKENS}. Download the file again."
            )
        self.num_image_tokens = num_image_tokens
        self.prefix_lm_mask = prefix_lm_mask
        self.do_lower_case, self.remove_space = do_lower_case, remove_space
        named = dict(kwargs.pop("model_specific_special_tokens", None) or {})
        for setting, token in _FIXED_TOKENS.items():
            given = str(named.pop(setting, kwargs.pop(setting, token)))
            if given != token:
                raise CheckpointError(
                    f"{Path(vocab_file).parent / 'tokenizer_config.json'}: `{setting}` is {given!r}, but "
                    f"ChatGLM-6B knows it as {token!r} alone. Remove the entry."
                )
        super().__init__(
            vocab_file,
            num_image_tokens=num_image_tokens,
            prefix_lm_mask=prefix_lm_mask,
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            model_specific_special_tokens=named,
            **kwargs,
        )

    def _read(self, path: Path) -> bytes:
        return read_sentencepiece_file(path)

    def _load(self, content: bytes) -> None:
        self.sp_model = _processor(content)
        self._ties = TieBreaker(self.sp_model)
        self._pieces = PieceTable(self.sp_model)

    # ---- vocabulary ----

    @property
    def vocab_size(self) -> int:
        """Number of image tokens and pieces, without tokens a user added."""
        return self.num_image_tokens + self.sp_model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        """Return every token's name and id, image tokens and added tokens included."""
        vocab = {self._name_of(index): index for index in range(self.vocab_size)}
        return {**vocab, **self._added_tokens_encoder}

    def _name_of(self, index: int) -> str:
        if index in self._added_tokens_decoder:
            return str(self._added_tokens_decoder[index])
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        return self.sp_model.IdToPiece(index - self.num_image_tokens)

    def _is_known(self, token: str) -> bool:
        image = _IMAGE_TOKEN.fullmatch(token)
        if image and int(image[1]) < self.num_image_tokens:
            return True
        return self.sp_model.IdToPiece(self.sp_model.PieceToId(token)) == token

    def _convert_token_to_id(self, token: str) -> int:
        image = _IMAGE_TOKEN.fullmatch(token)
        if image and int(image[1]) < self.num_image_tokens:
            return int(image[1])
        return self.sp_model.PieceToId(token) + self.num_image_tokens

    def _convert_id_to_token(self, index: int) -> str:
        return self._name_of(index) if 0 <= index < self.vocab_size else ""

    def get_command(self, token: str) -> int:
        """Return the id of a piece of the vocabulary such as ``[gMASK]``.

        Raises:
            KeyError: there is no such piece.
        """
        if not self._is_known(token):
            raise KeyError(token)
        return self._convert_token_to_id(token)

    @property
    def command_names(self) -> tuple[str, ...]:
        """Names of the command pieces of the vocabulary."""
        return _CONTROL_PIECES

    @property
    def suffix_ids(self) -> list[int]:
        """The ids every input ends with: ``[gMASK] <sop>``."""
        return [self.get_command("[gMASK]"), self.get_command("<sop>")]

    @property
    def end_id(self) -> int:
        """The id that ends an answer: ``<eop>``."""
        return self.get_command("<eop>")

    # ---- text to ids and back ----

    def _piece_ids(self, text: str) -> list[int]:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        text = text.replace("\n", _LINE_BREAK).replace("\t", _TAB)
        text = _BLANKS.sub(lambda run: f"<|blank_{len(run[0])}|>", text)
        ids = self._ties.settle(self.sp_model.EncodeAsIds(without_surrogates(text)))
        return [index + self.num_image_tokens for index in ids]

    def _call_ids(self, text: str) -> list[int]:
        # As transformers split texts for the release: at names of special tokens, with the blanks around
        # them.
        names = [name for name in self.all_special_tokens if name not in self._added_tokens_encoder]
        ids: list[int] = []
        for part in re.split(rf"\s*({'|'.join(map(re.escape, names))})\s*", text):
            ids += [self._convert_token_to_id(part)] if part in names else self.text_ids(part)
        return ids

    @property
    def _ids_to_skip(self) -> set[int]:
        return super()._ids_to_skip | set(self.all_special_ids)

    def _ids_to_text(self, ids: list[int]) -> str:
        """Decode ids; command tokens and image tokens are no text."""
        end = self.vocab_size
        real = [i for i in ids if self.num_image_tokens <= i < end or i in self._added_tokens_decoder]
        return self.convert_tokens_to_string([self._name_of(index) for index in real])

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Join pieces; pieces that stand for white space become it."""
        return _WHITESPACE_PIECE.sub(_whitespace, self.sp_model.DecodePieces(list(tokens)))

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
            is_text = self.num_image_tokens <= index < self.vocab_size or index in self._added_tokens_decoder
            return self._name_of(index) if is_text and index not in skipped else None

        return _WhitespaceText(SentencePieceText(self._pieces, piece_of, goes_on=goes_on))

    def _official_keys(self) -> dict[str, object]:
        settings = {"do_lower_case": self.do_lower_case, "remove_space": self.remove_space}
        fixed = {name: _FIXED_TOKENS[name] for name in ("gmask_token", "end_token")}
        return {**super()._official_keys(), **fixed, **settings, "num_image_tokens": self.num_image_tokens}

    # ---- padding ----

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """Pad as every tokenizer does, or with ``prefix_lm_mask`` as the release does.

        Then a padded row has an ``attention_mask`` bool ``[1, S, S]`` (True = blocked) and ``position_ids``
        int64 ``[2, S]``, and a row that is not padded has neither.
        """
        padded = super()._pad(
            encoded_inputs,
            max_length,
            padding_strategy,
            pad_to_multiple_of,
            padding_side,
            True if self.prefix_lm_mask else return_attention_mask,
        )
        if not self.prefix_lm_mask:
            return padded
        if (padding_side or self.padding_side) != "left":
            raise ConfigError(
                "`prefix_lm_mask` is set and `padding_side` is `right`, but the release pads on the left "
                "alone. Pad on the left, or leave `prefix_lm_mask` off: the model derives both by itself."
            )
        real = padded.pop("attention_mask")
        if padding_strategy != PaddingStrategy.DO_NOT_PAD:
            ids = np.asarray(padded["input_ids"])
            padded["attention_mask"], padded["position_ids"] = self._prefix_lm_inputs(
                ids, len(real) - sum(real)
            )
        return padded

    def _prefix_lm_inputs(self, ids_S: np.ndarray, num_padding: int) -> tuple[np.ndarray, np.ndarray]:
        """Return mask and positions of one row that is padded on the left, as the release makes them.

        Kept for programs written against the released tokenizer, whose padding returns these two; the parity
        tests compare them entry by entry.

        The tokens before ``<sop>`` see each other, the others see what is before them; ``[MASK]``, where
        there is one, takes precedence over ``[gMASK]``.

        Source:
            THUDM/chatglm-6b, tokenization_chatglm.py, ``_pad``.
        """
        ids = ids_S[num_padding:]
        starts = np.flatnonzero(ids == self.get_command("<sop>"))
        context = int(starts[0]) if starts.size else ids.size
        blocked = ~np.tri(ids.size, dtype=bool)
        blocked[:, :context] = False
        positions = np.zeros((2, ids.size), dtype=np.int64)
        positions[0] = np.arange(ids.size)
        masks = [np.flatnonzero(ids == self.get_command(name)) for name in ("[MASK]", "[gMASK]")]
        first = next((int(places[0]) for places in masks if places.size), None)
        if first is not None:
            positions[0, context:] = first
        positions[1, context:] = np.arange(1, ids.size - context + 1)
        before = (num_padding, 0)
        mask = np.pad(blocked, (before, before), constant_values=True)
        return mask[None], np.pad(positions, ((0, 0), before))


class _WhitespaceText:
    """Turns names of white space into it, also those that several tokens spell, as decoding all does."""

    def __init__(self, pieces: SentencePieceText) -> None:
        self._pieces = pieces
        self._held = ""  # what may be the beginning of such a name

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now."""
        text = self._held + self._pieces.feed(token_id)
        begins = _WHITESPACE_BEGINS.search(text)
        end = begins.start() if begins else len(text)
        self._held = text[end:]
        return _WHITESPACE_PIECE.sub(_whitespace, text[:end])

    def finish(self) -> str:
        """Return what is held, to which nothing will be added."""
        text, self._held = self._held + self._pieces.finish(), ""
        return _WHITESPACE_PIECE.sub(_whitespace, text)


def _processor(content: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return the processor of a vocabulary file; command pieces are added where the file lacks them."""
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    if processor.IsUnknown(processor.PieceToId("[gMASK]")):
        processor.LoadFromSerializedProto(content + _command_pieces())
    return processor


def _image_tokens_of_config(vocab_file: Path) -> int:
    """Return the number of image tokens that config.json beside a vocabulary implies, 0 without that file.

    Its ``bos_token_id`` is the id of ``<sop>``, and what that exceeds the piece's place by stands in front.

    Raises:
        CheckpointError: ``bos_token_id`` is below the place of ``<sop>`` in the vocabulary.
    """
    config = read_json(vocab_file.with_name("config.json"))
    if "bos_token_id" not in config:
        return 0
    sop = _processor(read_sentencepiece_file(vocab_file)).PieceToId("<sop>")
    if not isinstance(config["bos_token_id"], int):
        raise CheckpointError(
            f"{vocab_file.parent}/config.json says `bos_token_id` = {shown(config['bos_token_id'])}, but it "
            "must be a whole number. Download the file again."
        )
    num_image_tokens = config["bos_token_id"] - sop
    if num_image_tokens < 0:
        raise CheckpointError(
            f"{vocab_file.parent}/config.json says `bos_token_id` = {config['bos_token_id']}, but `<sop>` is "
            f"number {sop} of {vocab_file.name}. The files are of different releases: download both again."
        )
    return num_image_tokens


def _whitespace(piece: re.Match[str]) -> str:
    if piece[1]:
        return " " * int(piece[1])
    return "\n" if piece[0] == _LINE_BREAK else "\t"


def _command_pieces() -> bytes:
    """Return what the files before April 2023 lack, as a serialized model to append to one.

    Appending works because of how protocol buffers merge: repeated pieces (field 1) are appended, and
    ``byte_fallback`` (field 35 of ``trainer_spec``, field 2) is added to what is there.
    """
    control, user_defined, byte = 3, 4, 6
    blanks = [f"<|blank_{length}|>" for length in range(2, _LONGEST_BLANK + 1)]
    pieces = [(name, control) for name in _CONTROL_PIECES]
    pieces += [(name, user_defined) for name in (_TAB, *blanks)]
    pieces += [(f"<0x{value:02X}>", byte) for value in range(256)]
    return b"".join(_piece(name, kind) for name, kind in pieces) + b"\x12\x03\x98\x02\x01"


def _piece(name: str, kind: int) -> bytes:
    """Serialize a piece: its text (field 1), score 0 (field 2, float) and type (field 3)."""
    message = b"\x0a" + bytes([len(name)]) + name.encode() + b"\x15" + bytes(4) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(message)]) + message
