"""Which tokenizer class belongs to which release, and how the tokenizer of a checkpoint folder is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glmtune.errors import CheckpointError
from glmtune.models.checkpoints.config_rules import read_config
from glmtune.models.releases.families import (
    NATIVE_TYPES,
    Family,
    detect_family,
    detect_tokenizer_family,
    parse_family,
    read_json,
)
from glmtune.models.releases.source import family_of_source, resolve_source
from glmtune.models.tokenizers.chatglm import ChatGLMTokenizer
from glmtune.models.tokenizers.chatglm2_and_3 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from glmtune.models.tokenizers.glm4 import ChatGLM4Tokenizer
from glmtune.models.tokenizers.tokenizer_json import JsonTokenizer
from glmtune.models.tokenizers.vocabulary import VocabularyTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZERS: dict[Family, type[VocabularyTokenizer]] = {
    Family.CHATGLM: ChatGLMTokenizer,
    Family.CHATGLM2: ChatGLM2Tokenizer,
    Family.CHATGLM2_32K: ChatGLM2Tokenizer,
    Family.CODEGEEX2: ChatGLM2Tokenizer,
    Family.CHATGLM3: ChatGLM3Tokenizer,
    Family.CHATGLM3_32K: ChatGLM3Tokenizer,
    Family.GLM4: ChatGLM4Tokenizer,
    Family.TRANSFORMERS: JsonTokenizer,
}
"""Family → class of its tokenizer; a folder with a tokenizer.json alone (an export) has `JsonTokenizer`."""
VOCABULARIES = tuple({each.vocab_files_names["vocab_file"]: None for each in TOKENIZERS.values()})
"""Names that the file of a tokenizer may have."""
MAX_PADDING_ROWS = 1024
"""Rows of the embedding without a token: 184 to 227 in the releases, which pad to a multiple of 128."""


def load_tokenizer(source: str | Path, *, family: Family | str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Args:
        source: as for `load_model`; a folder may hold the tokenizer's files alone.
        family: release line, only where no name tells it.

    Returns:
        A transformers tokenizer; it pads on the left.

    Raises:
        ConfigError: unknown source or family.
        CheckpointError: the tokenizer's files are missing, damaged or of a family without support.
    """
    folder = resolve_source(source)
    chosen = parse_family(family) if family is not None else family_of_source(source)
    if chosen is None:
        has_model = (folder / "config.json").is_file()
        chosen = detect_family(folder, read_config(folder)) if has_model else detect_tokenizer_family(folder)
    return load_tokenizer_folder(folder, chosen)


def load_tokenizer_folder(
    folder: str | Path, family: Family, *, keep_chat_template: bool = False
) -> VocabularyTokenizer:
    """Read the tokenizer of a checkpoint folder.

    Args:
        folder: holds ``tokenizer.model`` (ChatGLM-6B: ``ice_text.model``) and, as a rule,
            ``tokenizer_config.json``.
        family: the release; decides the class and the prompt rules.
        keep_chat_template: copy a chat template (Jinja, which other tools run) on when the tokenizer is
            saved; by default only one of ours is.

    Returns:
        A tokenizer whose ``family`` is the one given.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    folder = Path(folder)
    tokenizer_class = tokenizer_class_of(folder, Family(family))
    file = tokenizer_class.vocab_files_names["vocab_file"]
    if not (folder / file).is_file():
        found = (
            ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        )
        raise CheckpointError(
            f"{folder} holds no `{file}`, which the tokenizer of `{family}` needs; found: {found}. "
            "Copy the file from the official release."
        )
    read_json(folder / "tokenizer_config.json")  # transformers reads it itself, but takes more than JSON
    try:
        tokenizer = tokenizer_class.from_pretrained(
            str(folder), local_files_only=True, glmtune_family=Family(family).value
        )
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}/tokenizer_config.json or files beside it cannot be used as settings of a tokenizer "
            f"({type(error).__name__}: {str(error)[:200]}). Download them again."
        ) from error
    tokenizer.keeps_chat_template = keep_chat_template
    _check_against_config(folder, tokenizer)
    return tokenizer


def tokenizer_class_of(folder: Path, family: Family) -> type[VocabularyTokenizer]:
    """Return the class that reads a folder's tokenizer: for the release's file, else for tokenizer.json.

    A folder in transformers' format may have both, see `JsonTokenizer`; there tokenizer.json counts.
    """
    usual = TOKENIZERS[family]
    is_there = (folder / usual.vocab_files_names["vocab_file"]).is_file()
    has_json = (folder / JsonTokenizer.vocab_files_names["vocab_file"]).is_file()
    if has_json and is_there:
        is_there = read_json(folder / "config.json").get("model_type") not in NATIVE_TYPES
    return JsonTokenizer if has_json and not is_there else usual


def _check_against_config(folder: Path, tokenizer: VocabularyTokenizer) -> None:
    """Refuse a vocabulary that is not the one of the model beside it, such as a file that was cut.

    Raises:
        CheckpointError: ids that the model does not have, those of tokens that a user added included; rows of
            the model that no release leaves unused; special tokens with other ids than config.json gives
            them.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") not in (None, "chatglm", *NATIVE_TYPES):
        return  # other models leave as many rows unused as they like
    rows = config.get("padded_vocab_size", config.get("vocab_size"))
    if not isinstance(rows, int) or isinstance(rows, bool):
        return
    count, file = tokenizer.num_reserved_ids, tokenizer.vocab_files_names["vocab_file"]
    if not rows - MAX_PADDING_ROWS <= count <= rows:
        raise CheckpointError(
            f"{folder}/{file} and its special tokens make {count} ids, but the model beside it has {rows} "
            f"rows, of which releases leave at most {MAX_PADDING_ROWS} unused. The file is cut "
            "or of another release: download it again."
        )
    if len(tokenizer) > rows:
        added = tokenizer.added_tokens_decoder
        raise CheckpointError(
            f"{folder}/tokenizer_config.json adds {len(added)} tokens, which makes {len(tokenizer)} ids, but "
            f"the model beside it has {rows} rows for them: {added[max(added)]} would have none. Give it "
            f"more (`model.resize_token_embeddings({len(tokenizer)})`, then `model.save_pretrained`), or "
            "take tokens out of `added_tokens_decoder`."
        )
    stated = config.get("eos_token_id")
    # The first and the last generation number the end token behind all pieces; the others have it as a piece.
    ends = stated if isinstance(stated, list) else [stated]
    moves = tokenizer.family in (Family.CHATGLM, Family.GLM4)
    if moves and stated is not None and tokenizer.end_id not in ends:
        raise CheckpointError(
            f"{folder}/config.json says eos_token_id = {stated}, but the end token of {file} has the id "
            f"{tokenizer.end_id}. The files are of different releases, or lines of {file} are missing: "
            "download both again."
        )
