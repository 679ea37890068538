"""Write tests/golden/tokenizers: tiny vocabulary files and what independent encoders say about some texts.

    python scripts/make_golden_tokenizers.py

The encoders below are textbook ones over the pieces and ranks; they import nothing of glmtune. The file of
ChatGLM-6B has the form of March 2023, without command pieces: readers must add them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex
import sentencepiece

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tokenizers"
SENTENCES = (
    "你好，今天想去哪里？",
    "这条裙子颜色很白，面料柔软，穿着舒服。",
    "小明有3个苹果，又买了5个，一共有8个。",
    "问：下面哪一个是水果？答：苹果。",
    "The shop sells shirts, dresses and coats in many colours.",
    "How many apples are left? There are 12 - 7 = 5 apples left.",
    "[Round 0] get_weather: it is warm today!",
)
TEXTS = (
    "你好",
    "How many apples are left?",
    "def f(x):\n    return x\t# 苹果",
    "a  b   c" + " " * 81 + "d",
    "白色的裙子，很好看。\n\n答：",
    "it's 12345 apples!!",
    "😀",
)
CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_MERGES = 80


def train_unigram() -> bytes:
    """Train a unigram model whose `<n>` is piece 4, as in the release."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=180,
        pad_id=3,
        user_defined_symbols=["<n>"],
        character_coverage=1.0,
        normalization_rule_name="identity",
        split_digits=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def unigram_ids(model: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Find the best segmentation by dynamic programming; characters without a piece become bytes."""
    names = {model.IdToPiece(index): index for index in range(model.get_piece_size())}
    extra = [*CONTROL, "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))]
    first_extra = len(names)
    first_byte = first_extra + len(extra)
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    text = "▁" + text.strip(" ").replace(" ", "▁")
    ids: list[int] = []
    for part in re.split(r"(<n>|<\|tab\|>|<\|blank_\d+\|>)", text):
        if part in extra:
            ids.append(first_extra + extra.index(part))
        elif part == "<n>":
            ids.append(names[part])
        else:
            ids += best_segmentation(model, names, part, first_byte)
    return ids


def best_segmentation(
    model: sentencepiece.SentencePieceProcessor, names: dict[str, int], text: str, first_byte: int
) -> list[int]:
    """Return the pieces of the highest total score."""
    best: list[tuple[float, list[int]]] = [(0.0, [])] + [(-math.inf, [])] * len(text)
    for stop in range(1, len(text) + 1):
        for start in range(stop):
            piece = text[start:stop]
            if piece in names and names[piece] > 4:
                score, ids = model.GetScore(names[piece]), [names[piece]]
            elif stop - start == 1:
                score, ids = -100.0, [first_byte + byte for byte in piece.encode()]
            else:
                continue
            if best[start][0] + score > best[stop][0]:
                best[stop] = (best[start][0] + score, best[start][1] + ids)
    return best[-1][1]


def train_ranks() -> dict[bytes, int]:
    """Merge the most frequent pair of neighbours, again and again."""
    ranks = {bytes([value]): value for value in range(256)}
    words = [
        [bytes([byte]) for byte in word.encode()] for text in SENTENCES for word in regex.findall(WORDS, text)
    ]
    for _ in range(NUM_MERGES):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        words = [merged(word, left + right) for word in words]
    return ranks


def merged(word: list[bytes], piece: bytes) -> list[bytes]:
    """Join the neighbours that make up a piece, from the left."""
    out: list[bytes] = []
    for part in word:
        if out and out[-1] + part == piece:
            out[-1] = piece
        else:
            out.append(part)
    return out


def rank_ids(ranks: dict[bytes, int], text: str) -> list[int]:
    """Cut into words, then merge the pair of the lowest rank until none is left."""
    ids: list[int] = []
    for word in regex.findall(WORDS, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            found = [ranks[a + b] for a, b in pairwise(parts) if a + b in ranks]
            if not found:
                break
            piece = next(piece for piece, rank in ranks.items() if rank == min(found))
            parts = merged(parts, piece)
        ids += [ranks[part] for part in parts]
    return ids


def main() -> None:
    """Write everything, unless this script differs from its committed version."""
    git = ["git", "-C", str(TARGET.parent), "status", "--porcelain", "--", str(Path(__file__).resolve())]
    if subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip():
        sys.exit(
            f"{Path(__file__).name} has uncommitted changes; commit it first: fixtures must be traceable."
        )
    for folder in ("chatglm", "glm4"):
        (TARGET / folder).mkdir(parents=True, exist_ok=True)
    content, ranks = train_unigram(), train_ranks()
    (TARGET / "chatglm" / "ice_text.model").write_bytes(content)
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for piece, rank in ranks.items()]
    (TARGET / "glm4" / "tokenizer.model").write_text("".join(lines))
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    expected = {
        "chatglm": {
            "vocab_size": model.get_piece_size() + len(CONTROL) + 80 + 256,
            "commands": {name: model.get_piece_size() + place for place, name in enumerate(CONTROL)},
            "texts": [{"text": text, "ids": unigram_ids(model, text)} for text in TEXTS],
        },
        "glm4": {
            "vocab_size": len(ranks),
            "texts": [{"text": text, "ids": rank_ids(ranks, text)} for text in TEXTS],
        },
    }
    file = TARGET / "expected.json"
    file.write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    (TARGET / "README.md").write_text(README.format(digest=digest))


README = f"""# Golden tokenizer fixtures

Tiny vocabulary files in the forms of ChatGLM-6B (March 2023) and GLM-4, trained on sentences of our own, and
the encodings of independent textbook encoders.

| | |
|---|---|
| source | `scripts/make_golden_tokenizers.py` (sha256 `{{digest}}`), nothing downloaded |
| command | `python scripts/make_golden_tokenizers.py` |
| versions | Python {sys.version.split()[0]}, sentencepiece {sentencepiece.__version__} |
| tolerance | exact: integers |
"""


if __name__ == "__main__":
    main()
