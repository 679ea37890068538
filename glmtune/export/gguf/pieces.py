"""How llama.cpp cuts a text into sentencepiece's pieces, to see that a file has no rules beside them.

It knows pieces and scores alone: the two neighbours whose joined piece has the best score are joined, again
and again, and what is no piece becomes bytes. A file may also ask for other normalizing, or be of another
kind (unigram); then its ids would be others, in every program that reads the GGUF file.
"""

from __future__ import annotations

from collections.abc import Mapping

from glmtune.errors import CheckpointError
from glmtune.models.tokenizers.chatglm2_and_3 import SentencePieceGlmTokenizer

PROBES = (
    "你好，今天想去哪里？",
    "  Two blanks,\ttabs\n\nand line  breaks; naïve café №7 😀 ",
    "def f(x):\n    return x ** 2  # 12345",
    "ＡＢＣ１２３ ﬁ ½ Å",
)
"""Where rules differ: punctuation, blanks, line breaks, bytes of no piece, digits, forms to normalize."""


def check_pieces(
    names: Mapping[int, str], scores: Mapping[int, float], tokenizer: SentencePieceGlmTokenizer
) -> None:
    """Raise CheckpointError if llama.cpp would cut a probe text otherwise than the tokenizer does."""
    ids = {name: index for index, name in names.items() if index in scores}
    for text in PROBES:
        expected, found = tokenizer.sp_model.EncodeAsIds(text), cut(text, ids, scores)
        if found != expected:
            raise CheckpointError(
                f"llama.cpp would cut {text!r} into {found}, but the tokenizer's file says {expected}: it "
                "has rules beside pieces and scores, which a GGUF file cannot say. Use `format=official`."
            )


def cut(text: str, ids: Mapping[str, int], scores: Mapping[int, float]) -> list[int]:
    """Return the ids of a text as llama.cpp finds them.

    Args:
        text: any.
        ids: piece → id.
        scores: id → score.
    """
    parts = list(f" {text}".replace(" ", "▁"))
    while True:
        joined = [
            (scores[index], -place)
            for place in range(len(parts) - 1)
            if (index := ids.get(parts[place] + parts[place + 1])) is not None
        ]
        if not joined:
            break
        place = -max(joined)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [
        index
        for part in parts
        for index in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]
