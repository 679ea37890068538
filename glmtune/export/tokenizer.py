"""GLM tokenizers as `tokenizer.json` with a chat template, which transformers and vLLM read by themselves.

The official tokenizers are Python files beside the weights ("remote code"), which many servers do not run.
What a translation may lose is compared, once it is written and read by transformers alone, before an export
appears: see ``tokenizer_probes.py``.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from glmtune.errors import CheckpointError
from glmtune.export.tokenizer_probes import compare_tokenizers
from glmtune.models.templates.jinja_forms import BORDER, HIDDEN, jinja_form
from glmtune.models.tokenizers.chatglm2_and_3 import SentencePieceGlmTokenizer
from glmtune.models.tokenizers.glm4 import WORDS, ChatGLM4Tokenizer
from glmtune.models.tokenizers.tokenizer_json import ADDED_KEY, JsonTokenizer
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

_RENAMED = {"sop": "<sop>", "eop": "<eop>"}
"""Command tokens whose names are parts of words, so that no text can be searched for them."""
_UNUSED = frozenset({"<s>", "[MASK]", "[sMASK]", "<eop>"})
"""Control and command tokens of ChatGLM2 and 3 that no template writes: they have ids, but are not looked for
in texts, as in the release. (GLM-4's own tokenizer looks for all of its special tokens.)"""


def write_tokenizer(tokenizer: VocabularyTokenizer, folder: Path) -> None:
    """Write a tokenizer as transformers reads it, read it back, and compare.

    Args:
        tokenizer: of ChatGLM2 or later, or of a folder in transformers' format, whose file is kept.
        folder: where to; a generation_config.json that lies there is compared, too.

    Raises:
        CheckpointError: there is no such form, or it would encode, prompt, decode or stop otherwise.
    """
    if isinstance(tokenizer, JsonTokenizer):
        tokenizer.save_pretrained(str(folder))
    else:
        save_fast_tokenizer(fast_tokenizer(tokenizer), folder)
    fast = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    compare_tokenizers(tokenizer, fast, folder)


def fast_tokenizer(tokenizer: VocabularyTokenizer) -> PreTrainedTokenizerFast:
    """Translate a tokenizer; the same text gives the same ids.

    Names of special tokens become recognised in text, as chat templates need; ``sop`` and ``eop``, which are
    parts of words, are called ``<sop>`` and ``<eop>``. Tokens that a user added keep ids and kind.

    Args:
        tokenizer: of ChatGLM2 or later.

    Raises:
        CheckpointError: transformers has no such form.
    """
    if isinstance(tokenizer, SentencePieceGlmTokenizer):
        backend, names = _from_sentencepiece(tokenizer)
    elif isinstance(tokenizer, ChatGLM4Tokenizer):
        backend, names = _from_ranks(tokenizer)
    else:
        raise CheckpointError(
            f"The tokenizer of `{tokenizer.family}` has no form that transformers reads without remote code. "
            "Use `format=official`."
        )
    added = _added_tokens(tokenizer)
    backend.add_special_tokens([_token(name, special=True) for name in names])
    backend.add_tokens([_token(name, special=special) for _, name, special in added])
    prefix = list(zip(("[gMASK]", "<sop>"), tokenizer.prefix_ids, strict=True))
    single = " ".join(name for name, _ in prefix)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{single} $A", pair=f"{single} $A $B", special_tokens=prefix
    )
    own = {ADDED_KEY: [name for _, name, _ in added]} if added else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=backend.id_to_token(tokenizer.end_id),
        pad_token=backend.id_to_token(cast(int, tokenizer.pad_token_id)),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=jinja_form(tokenizer.family, names=names, added=[name for _, name, _ in added]),
        **own,
    )


def save_fast_tokenizer(fast: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.

    The class is named as transformers 4 and 5 both know it.
    """
    fast.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")


def _added_tokens(tokenizer: VocabularyTokenizer) -> list[tuple[int, str, bool]]:
    """Return the tokens that a user added, each with its id and whether it is special."""
    added = tokenizer.added_tokens_decoder
    return [(index, str(token), bool(token.special)) for index, token in sorted(added.items())]


def _from_sentencepiece(tokenizer: SentencePieceGlmTokenizer) -> tuple[Tokenizer, list[str]]:
    """Byte-fallback BPE: a pair may merge if the joined piece exists, the best-scored piece first.

    The file holds pieces with scores, not merges, while `tokenizer.json` holds merges: every way to cut a
    piece into two pieces is one, in the order of the scores of what comes out.

    Returns:
        The tokenizer, and the names that it shall find in texts.
    """
    processor = tokenizer.sp_model
    pieces = [processor.IdToPiece(index) for index in range(processor.get_piece_size())]
    ids = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[float, int, int]] = []
    # sentencepiece has no list of merges: it may join any two pieces whose whole is a piece. So every cut of
    # every piece becomes a merge, ordered by the score of the whole.
    for index, piece in enumerate(pieces):
        if processor.IsControl(index) or processor.IsByte(index) or processor.IsUnknown(index):
            continue
        halves = ((ids.get(piece[:cut]), ids.get(piece[cut:])) for cut in range(1, len(piece)))
        score = processor.GetScore(index)
        merges += [(-score, left, right) for left, right in halves if left is not None and right is not None]
    named = [(pieces[left], pieces[right]) for _, left, right in sorted(merges)]
    commands = {_RENAMED.get(name, name): tokenizer.get_command(name) for name in tokenizer.COMMANDS}
    added = {name: index for index, name, _ in _added_tokens(tokenizer)}
    model = models.BPE(
        {**ids, **commands, **added}, named, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(HIDDEN, ""), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ends = [pieces[tokenizer.end_id], pieces[0]]  # named as end and padding, which transformers looks for
    return backend, [name for name in (*ends, *commands) if name not in _UNUSED]


def _from_ranks(tokenizer: ChatGLM4Tokenizer) -> tuple[Tokenizer, list[str]]:
    """Byte-level BPE: each piece is merged from the two parts that lower ranks leave of its bytes.

    Returns:
        The tokenizer, and the names that it shall find in texts.
    """
    ranks = {piece: rank for piece, rank in tokenizer.get_vocab().items() if isinstance(piece, bytes)}
    letters = _byte_letters()
    shown = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = [
        tuple(shown[part] for part in _parts(piece, rank, ranks))
        for piece, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(piece) > 1
    ]
    vocab = {shown[piece]: rank for piece, rank in ranks.items()}
    vocab |= {name: tokenizer.get_command(name) for name in tokenizer.COMMANDS}
    vocab |= {name: index for index, name, _ in _added_tokens(tokenizer)}
    backend = Tokenizer(models.BPE(vocab, [(left, right) for left, right in merges], ignore_merges=True))
    backend.normalizer = normalizers.Replace(HIDDEN, "")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(BORDER, behavior="removed"),
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, list(tokenizer.COMMANDS)


def _parts(piece: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge the bytes of a piece by rank as long as the result ranks below the piece itself."""
    parts = [bytes([byte]) for byte in piece]
    # tiktoken stores pieces and ranks, tokenizers want pairs. Merging as tiktoken does, but with lower ranks
    # only, stops at the two parts whose merge made the piece.
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


def _token(name: str, *, special: bool) -> AddedToken:
    return AddedToken(name, special=special, normalized=False)
