"""GLM tokenizers as `tokenizer.json` with a chat template, which transformers and vLLM read by themselves.

The official tokenizers are Python files beside the weights ("remote code"), which many servers do not run.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from glmtune.errors import CheckpointError
from glmtune.models.templates.jinja_forms import CHAT_TEMPLATES
from glmtune.models.tokenizers.base import GlmTokenizer
from glmtune.models.tokenizers.chatglm2_and_3 import SentencePieceGlmTokenizer
from glmtune.models.tokenizers.glm4 import WORDS, ChatGLM4Tokenizer

# Where translations go wrong: Chinese punctuation, leading and repeated blanks, line breaks, bytes of no
# piece, digits.
PROBE_TEXTS = (
    "你好，今天想去哪里？",
    "  Two blanks,\ttabs\n\nand line  breaks; naïve café №7 😀",
    "def f(x):\n    return x ** 2  # 12345",
)


def fast_tokenizer(tokenizer: GlmTokenizer) -> PreTrainedTokenizerFast:
    """Translate a tokenizer; the same text gives the same ids.

    Names of special tokens become recognised in text, as chat templates need; ``sop`` and ``eop``, which are
    parts of words, are called ``<sop>`` and ``<eop>``.

    Args:
        tokenizer: of ChatGLM2 or later.

    Raises:
        CheckpointError: the two give different ids for a probe text.
    """
    if isinstance(tokenizer, SentencePieceGlmTokenizer):
        backend = _from_sentencepiece(tokenizer)
    elif isinstance(tokenizer, ChatGLM4Tokenizer):
        backend = _from_ranks(tokenizer)
    else:
        raise CheckpointError(
            f"The tokenizer of `{tokenizer.family}` has no form that transformers reads without remote code. "
            "Use `format=official`."
        )
    prefix = list(zip(("[gMASK]", "<sop>"), tokenizer.prefix_ids, strict=True))
    single = " ".join(name for name, _ in prefix)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{single} $A", pair=f"{single} $A $B", special_tokens=prefix
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=backend.id_to_token(tokenizer.end_id),
        pad_token=backend.id_to_token(cast(int, tokenizer.pad_token_id)),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATES.get(tokenizer.family),
    )
    for text in PROBE_TEXTS:
        expected = [*tokenizer.prefix_ids, *tokenizer.text_ids(text)]
        if (found := fast(text)["input_ids"]) != expected:
            raise CheckpointError(
                f"The translated tokenizer gives {found} for {text!r}, but the official one {expected}. "
                "The tokenizer file has rules of its own; use `format=official`."
            )
    return fast


def save_fast_tokenizer(fast: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.

    The class is named as transformers 4 and 5 both know it.
    """
    fast.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")


def _from_sentencepiece(tokenizer: SentencePieceGlmTokenizer) -> Tokenizer:
    """Byte-fallback BPE: a pair may merge if the joined piece exists, the best-scored piece first.

    The file holds pieces with scores, not merges, while `tokenizer.json` holds merges: every way to cut a
    piece into two pieces is one, in the order of the scores of what comes out.
    """
    processor = tokenizer.sp_model
    pieces = [processor.IdToPiece(index) for index in range(processor.get_piece_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[float, int, int]] = []
    for index, piece in enumerate(pieces):
        if processor.IsControl(index) or processor.IsByte(index) or processor.IsUnknown(index):
            continue
        halves = ((ids.get(piece[:cut]), ids.get(piece[cut:])) for cut in range(1, len(piece)))
        score = processor.GetScore(index)
        merges += [(-score, left, right) for left, right in halves if left is not None and right is not None]
    named = [(pieces[left], pieces[right]) for _, left, right in sorted(merges)]
    backend = Tokenizer(models.BPE(ids, named, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([_special(pieces[index]) for index in range(3)])
    names = [f"<{name}>" if name in ("sop", "eop") else name for name in tokenizer.COMMANDS]
    backend.add_special_tokens([_special(name) for name in names])
    return backend


def _from_ranks(tokenizer: ChatGLM4Tokenizer) -> Tokenizer:
    """Byte-level BPE: each piece is merged from the two parts that lower ranks leave of its bytes."""
    ranks = {piece: rank for piece, rank in tokenizer.get_vocab().items() if isinstance(piece, bytes)}
    letters = _byte_letters()
    shown = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = [
        tuple(shown[part] for part in _parts(piece, rank, ranks))
        for piece, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(piece) > 1
    ]
    vocab = {shown[piece]: rank for piece, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab, [(left, right) for left, right in merges], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([_special(name) for name in tokenizer.COMMANDS])
    return backend


def _parts(piece: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge the bytes of a piece by rank as long as the result ranks below the piece itself."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        joined = [
            (ranks.get(left + right, limit), place) for place, (left, right) in enumerate(pairwise(parts))
        ]
        rank, place = min(joined)
        if rank >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _byte_letters() -> list[str]:
    """Return the visible letter that byte-level BPE writes for each byte: itself, or one above 255."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)
