"""Which tokenizer class belongs to which release, and how the tokenizer of a checkpoint folder is read."""

from __future__ import annotations

from pathlib import Path

from glmtune.errors import CheckpointError
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.chatglm import ChatGLMTokenizer
from glmtune.models.tokenizers.chatglm2_and_3 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from glmtune.models.tokenizers.glm4 import ChatGLM4Tokenizer
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

TOKENIZERS: dict[Family, type[VocabularyTokenizer]] = {
    Family.CHATGLM: ChatGLMTokenizer,
    Family.CHATGLM2: ChatGLM2Tokenizer,
    Family.CHATGLM2_32K: ChatGLM2Tokenizer,
    Family.CODEGEEX2: ChatGLM2Tokenizer,
    Family.CHATGLM3: ChatGLM3Tokenizer,
    Family.CHATGLM3_32K: ChatGLM3Tokenizer,
    Family.GLM4: ChatGLM4Tokenizer,
}
"""Family → class of its tokenizer."""


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
    # `from_pretrained` of transformers 5 opens tokenizer_config.json twice by itself (for names of fast
    # tokenizer files, then for the settings); so nothing here reads the file once more.
    return tokenizer_class.from_pretrained(
        str(folder), local_files_only=True, glmtune_family=Family(family).value
    )
