"""Write a model as a GGUF file with a Modelfile beside it, and hold what was written against its source."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Glm4Config, GlmConfig

from glmtune.errors import CheckpointError, ConfigError
from glmtune.export.gguf.encoding import encode
from glmtune.export.gguf.hyperparameters import Hyperparameters
from glmtune.export.gguf.layout import file_tensors, native_names
from glmtune.export.gguf.modelfile import modelfile
from glmtune.export.gguf.reading import GgufFile, read_gguf
from glmtune.export.gguf.types import FILE_TYPES, FileType, gguf_package, num_bytes, tensor_type
from glmtune.export.gguf.vocabulary import Vocabulary, vocabulary_of
from glmtune.memory import trim_memory
from glmtune.models.checkpoints.shard_writer import LazyTensors
from glmtune.models.generation import GENERATION_FILE, release_generation
from glmtune.models.releases.families import Family
from glmtune.models.tokenizers.load import load_tokenizer_folder
from glmtune.storage.files import write_text
from glmtune.storage.names import last_part

MODELFILE = "Modelfile"
ROWS_AT_ONCE = 4096
QUANTIZATION_VERSION = 2
"""Of the layouts of blocks, as llama.cpp counts them."""


@dataclass(frozen=True, slots=True)
class Written:
    """What is to be written.

    Attributes:
        name: of the model.
        source: folder of the checkpoint: tokenizer, and how the release samples.
        config: as made by `native_config`, unquantized.
        family: release line.
        weights: native name → tensor.
        file_type: key of ``FILE_TYPES``.
    """

    name: str
    source: Path
    config: GlmConfig | Glm4Config
    family: Family
    weights: LazyTensors
    file_type: str


def check_gguf(family: Family, prefix_path: str | None) -> None:
    """Raise for what no GGUF file can hold, before anything is read.

    Args:
        family: release line of the base.
        prefix_path: a tuned prefix, if one is to be exported.

    Raises:
        ConfigError: ChatGLM-6B, or a prefix.
        MissingExtraError: the `gguf` package is not installed.
    """
    if family is Family.CHATGLM:
        raise ConfigError(
            "`format` is `gguf`, but llama.cpp has no architecture for ChatGLM-6B (two-dimensional "
            "positions, prefix mask). Use `format=official`, or take chatglm2-6b or a later release."
        )
    if prefix_path is not None:
        raise ConfigError(
            "`format` is `gguf`, but llama.cpp has no place for a prefix: keys and values in front of every "
            "layer. Serve it with `glmtune serve`, or tune with LoRA, which is merged into the file."
        ).see("prefix-export")
    gguf_package()


def model_name(source: str) -> str:
    """Return a name for files, of a preset, a hub id or a folder.

    >>> model_name("zai-org/GLM-4-9B-0414"), model_name("runs/my model")
    ('GLM-4-9B-0414', 'my-model')
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last_part(source)).strip("-.") or "model"


def write_gguf(folder: Path, job: Written, on_tensor: Callable[[int, int], object]) -> int:
    """Write the file and the Modelfile; one tensor at a time is in memory.

    Args:
        folder: exists, and is not yet the final one.
        job: what to write.
        on_tensor: told after each tensor how many are written, and of how many.

    Returns:
        Bytes of the weights.

    Raises:
        ConfigError: a model that llama.cpp cannot compute.
        CheckpointError: a tokenizer that it cannot have, or weights that are no numbers.
        OSError: the disk is full.
    """
    sizes = Hyperparameters.of(job.config)
    tokenizer = load_tokenizer_folder(job.source, job.family)
    vocabulary = vocabulary_of(tokenizer, job.config.vocab_size)
    tensors = file_tensors(job.weights, job.config)
    is_tied = bool(job.config.tie_word_embeddings)
    kinds = {
        name: tensor_type(
            name, shape, job.file_type, num_layers=job.config.num_hidden_layers, head_is_tied=is_tied
        )
        for name, shape in tensors.shapes.items()
    }
    generation = None
    if (job.source / GENERATION_FILE).is_file():
        generation = release_generation(job.source, job.config)
    file = folder / f"{job.name}-{job.file_type}.gguf"
    total = _write_file(file, job, sizes, vocabulary, generation, tensors, kinds, on_tensor)
    write_text(folder / MODELFILE, modelfile(file.name, vocabulary, job.family, generation))
    return total


def _write_file(
    file: Path,
    job: Written,
    sizes: Hyperparameters,
    vocabulary: Vocabulary,
    generation: Any,
    tensors: LazyTensors,
    kinds: dict[str, str],
    on_tensor: Callable[[int, int], object],
) -> int:
    gguf = gguf_package()
    with closing(gguf.GGUFWriter(file, sizes.architecture)) as writer:
        writer.add_type("model")
        writer.add_name(job.name)
        writer.add_file_type(FILE_TYPES[job.file_type].number)
        writer.add_quantization_version(QUANTIZATION_VERSION)
        for key, value in sizes.keys().items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(key, value)
        if generation is not None and generation.do_sample:
            _add_sampling(writer, generation)
        _add_vocabulary(writer, vocabulary)
        total = 0
        for name, shape in tensors.shapes.items():
            kind = gguf.GGMLQuantizationType[kinds[name]]
            size = num_bytes(shape, kinds[name])
            # float32 only says that the shape counts weights, not bytes.
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
            total += size
        # All places of tensors are in the header, so every size is told before the first tensor is made.
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, name in enumerate(tensors, start=1):
            writer.write_tensor_data(encode(name, tensors[name], kinds[name]))
            trim_memory()
            on_tensor(done, len(kinds))
    return total


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pattern)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(True)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _add_sampling(writer: Any, generation: Any) -> None:
    """Write how the release samples; llama.cpp takes it where its user says nothing."""
    for name, key, add in (
        ("temperature", "temp", writer.add_float32),
        ("top_p", "top_p", writer.add_float32),
        ("top_k", "top_k", writer.add_int32),
        ("repetition_penalty", "penalty_repeat", writer.add_float32),
    ):
        if (value := getattr(generation, name, None)) is not None:
            add(f"general.sampling.{key}", value)


def read_back(folder: Path, job: Written) -> tuple[GgufFile, LazyTensors]:
    """Read what was written, as another program would, and compare it with its source.

    Sizes must be equal, and every tensor as near to its source as rounding to its type brings any weights:
    rows in another order are off by more than their own size, in whatever type.

    Args:
        folder: as `write_gguf` left it.
        job: what was written.

    Returns:
        The file, and its weights under native names.

    Raises:
        CheckpointError: they differ.
    """
    found = read_gguf(folder / f"{job.name}-{job.file_type}.gguf")
    problems = found.hyperparameters.differences(Hyperparameters.of(job.config))
    names = {name for name in job.weights if name != "lm_head.weight" or not job.config.tie_word_embeddings}
    native = native_names(found.tensors, job.config, job.weights.shapes)
    for name in sorted(names):
        error, limit = _error(native[name], job.weights[name], FILE_TYPES[job.file_type])
        trim_memory()
        if not error <= limit:
            problems.append(f"{name} is off by {error:.2g} of its size, and {limit:.2g} is allowed")
    if problems:
        raise CheckpointError(
            f"The GGUF file does not hold what its source does: {'; '.join(problems[:8])}. Use another "
            "`gguf_type`, and report this if it stays."
        )
    return found, native


def _error(found: Tensor, expected: Tensor, file_type: FileType) -> tuple[float, float]:
    """Return how far a tensor is off, and how far it may be, relative to its size (root mean square)."""
    difference, size = 0.0, 0.0
    for ours, theirs in zip(found.split(ROWS_AT_ONCE), expected.split(ROWS_AT_ONCE), strict=True):
        whole = theirs.float()
        difference += float((ours - whole).square().sum(dtype=torch.float64))
        size += float(whole.square().sum(dtype=torch.float64))
    if size == 0:
        return math.sqrt(difference), 0.0
    return math.sqrt(difference / size), file_type.max_error + file_type.smallest * math.sqrt(
        found.numel() / size
    )
