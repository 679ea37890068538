"""Train the sentencepiece tokenizer of glm-tiny: ChatGLM2's kind of file, a small vocabulary."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

from glmtune.models.templates.renderer import render_prompt
from glmtune.tiny.corpus.characters import required_characters
from glmtune.tiny.corpus.mix import stream
from glmtune.tiny.corpus.sample import Sample

CONTROL_AND_BYTES = 3 + 256
MERGES = 500
TOKENIZER_CONFIG = {
    "name_or_path": "glm-tiny",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    "glmtune_family": "chatglm2",
}


def plain(sample: Sample) -> str:
    """Return a sample as the one text a ChatGLM2 would see."""
    if sample.text:
        return sample.text
    pairs = [
        (q.content, a.content) for q, a in zip(sample.messages[:-2:2], sample.messages[1:-2:2], strict=True)
    ]
    return render_prompt(sample.messages[-2].content, pairs) + sample.messages[-1].content


def _lines(seed: int, rows: int) -> Iterator[str]:
    """Yield English lines only: merged pieces become English words, Chinese characters stay alone."""
    for sample in stream(seed, rows, salt="tokenizer"):
        if sample.skill != "strings":
            yield from (line for line in plain(sample).split("\n") if line and line.isascii())


def train_tokenizer(folder: Path, *, seed: int = 0, rows: int = 12_000) -> int:
    """Train on the corpus and write ``tokenizer.model`` and ``tokenizer_config.json``.

    Pieces: three controls, 256 bytes, every character of `required_characters`, and ``MERGES`` frequent
    pieces of the corpus' English lines. ChatGLM2's command tokens follow the pieces and are no part of
    the file.

    Args:
        folder: where to write.
        seed: seed of the corpus rows used.
        rows: how many of them.

    Returns:
        The number of pieces in the file.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(seed, rows),
        model_writer=model,
        model_type="bpe",
        vocab_size=CONTROL_AND_BYTES + len(required_characters()) + 1 + MERGES,
        required_chars=required_characters(),
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        max_sentencepiece_length=7,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
        train_extremely_large_corpus=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    text = json.dumps(TOKENIZER_CONFIG, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
