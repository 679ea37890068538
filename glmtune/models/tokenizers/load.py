"""The tokenizer of each release as a transformers tokenizer without remote code, and how a folder is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.chatglm import ChatGLMTokenizer, image_token_settings
from glmtune.models.tokenizers.chatglm2_and_3 import SentencePieceGlmTokenizer
from glmtune.models.tokenizers.glm4 import ChatGLM4Tokenizer
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

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


TOKENIZERS: dict[Family, type[VocabularyTokenizer]] = {
    Family.CHATGLM: ChatGLMTokenizer,
    Family.CHATGLM2: ChatGLM2Tokenizer,
    Family.CHATGLM2_32K: ChatGLM2Tokenizer,
    Family.CODEGEEX2: ChatGLM2Tokenizer,
    Family.CHATGLM3: ChatGLM3Tokenizer,
    Family.CHATGLM3_32K: ChatGLM3Tokenizer,
    Family.GLM4: ChatGLM4Tokenizer,
}


def load_tokenizer_folder(folder: str | Path, family: Family) -> VocabularyTokenizer:
    """Read the tokenizer of a checkpoint folder.

    Args:
        folder: holds ``tokenizer.model`` (ChatGLM-6B: ``ice_text.model``) and, as a rule,
            ``tokenizer_config.json``.
        family: the release; decides the class and the prompt rules.

    Returns:
        A tokenizer whose ``family`` is the one given.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    folder = Path(folder)
    tokenizer_class = TOKENIZERS[Family(family)]
    file = tokenizer_class.vocab_files_names["vocab_file"]
    if not (folder / file).is_file():
        found = (
            ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        )
        raise CheckpointError(
            f"{folder} holds no `{file}`, which the tokenizer of `{family}` needs; found: {found}. "
            "Copy the file from the official release."
        )
    settings: dict[str, Any] = {"local_files_only": True, "glmtune_family": Family(family).value}
    if tokenizer_class is ChatGLMTokenizer:
        settings |= image_token_settings(folder)
    return tokenizer_class.from_pretrained(str(folder), **settings)
