"""The tokenizers of ChatGLM2, CodeGeeX2 and ChatGLM3 as transformers tokenizers without remote code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from glmtune.errors import CheckpointError
from glmtune.models.chat_tokenizer import GlmTokenizer
from glmtune.models.families import Family
from glmtune.models.sentencepiece_tokenizer import SentencePieceGlmTokenizer

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_ROLE_TOKEN = re.compile(f"({'|'.join(map(re.escape, ROLE_TOKENS))})")


class ChatGLM2Tokenizer(SentencePieceGlmTokenizer):
    """Tokenizer of ChatGLM2-6B, ChatGLM2-6B-32K and CodeGeeX2-6B; decoding drops command tokens."""

    DEFAULT_FAMILY = Family.CHATGLM2


class ChatGLM3Tokenizer(SentencePieceGlmTokenizer):
    """Tokenizer of ChatGLM3-6B(-32K): ChatGLM2's file and, behind its command tokens, the role tokens.

    As in the release, decoding writes the names of command tokens, also under ``skip_special_tokens``;
    cut generated ids at the template's ``stop_ids`` before decoding them.

    Attributes:
        encode_special_tokens: recognise the names of role tokens in a text given to the tokenizer. Prompt
            templates never do.
    """

    COMMANDS = (*SentencePieceGlmTokenizer.COMMANDS, *ROLE_TOKENS)
    DEFAULT_FAMILY = Family.CHATGLM3

    def __init__(self, vocab_file: str, *, encode_special_tokens: bool = False, **kwargs: Any) -> None:
        """Read a sentencepiece file.

        Args:
            vocab_file: path of ``tokenizer.model``.
            encode_special_tokens: see the class.
            kwargs: as for every tokenizer here.
        """
        self.encode_special_tokens = encode_special_tokens
        super().__init__(vocab_file, encode_special_tokens=encode_special_tokens, **kwargs)

    def _call_ids(self, text: str) -> list[int]:
        if not self.encode_special_tokens:
            return self.text_ids(text)
        ids: list[int] = []
        for part in _ROLE_TOKEN.split(text):
            ids += [self.get_command(part)] if part in ROLE_TOKENS else self.text_ids(part)
        return ids

    def _convert_id_to_token(self, index: int) -> str:
        if self._num_pieces <= index < self.vocab_size:
            return self.COMMANDS[index - self._num_pieces]
        return super()._convert_id_to_token(index)


TOKENIZERS: dict[Family, type[SentencePieceGlmTokenizer]] = {
    Family.CHATGLM2: ChatGLM2Tokenizer,
    Family.CHATGLM2_32K: ChatGLM2Tokenizer,
    Family.CODEGEEX2: ChatGLM2Tokenizer,
    Family.CHATGLM3: ChatGLM3Tokenizer,
    Family.CHATGLM3_32K: ChatGLM3Tokenizer,
}


def load_tokenizer_folder(folder: str | Path, family: Family) -> GlmTokenizer:
    """Read the tokenizer of a checkpoint folder.

    Args:
        folder: holds ``tokenizer.model`` and, as a rule, ``tokenizer_config.json``.
        family: the release; decides the class and the prompt rules.

    Returns:
        A tokenizer whose ``family`` is the one given.

    Raises:
        CheckpointError: a file is missing or broken, or the family is not supported yet.
    """
    folder = Path(folder)
    tokenizer_class = TOKENIZERS.get(Family(family))
    if tokenizer_class is None:
        known = ", ".join(sorted(TOKENIZERS))
        raise CheckpointError(
            f"{folder}: the tokenizer of `{family}` cannot be read yet; supported are: {known}. "
            "If the folder holds one of these, pass `family=` with its name."
        )
    if not (folder / "tokenizer.model").is_file():
        found = (
            ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        )
        raise CheckpointError(
            f"{folder} holds no `tokenizer.model`, which the tokenizer of `{family}` needs; found: {found}. "
            "Copy the file from the official release."
        )
    return tokenizer_class.from_pretrained(
        str(folder), local_files_only=True, glmtune_family=Family(family).value
    )
