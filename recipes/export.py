"""`glmtune export`: base + prefix or adapter, as a folder that other tools read."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmtune.errors import ConfigError
from glmtune.export.gguf.types import DEFAULT_TYPE, FILE_TYPES
from glmtune.models.settings import DTYPES, CheckpointSettings
from glmtune.settings import SCALE_HELP, STRENGTH_HELP, check_choice, check_range, setting
from glmtune.storage.names import last_part, portable_name
from recipes.words.compose import Command

if TYPE_CHECKING:
    from glmtune.export.export import Exported
    from glmtune.export.source import OnProgress

FORMATS = ("transformers", "official", "prefix", "tuned", "peft", "gguf")
MAX_SHARD_MIB = 2048
MEBIBYTE = 2**20


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and into which form."""

    model: CheckpointSettings = setting(CheckpointSettings, "the base model")
    format: str = setting(
        "transformers",
        "transformers (GlmForCausalLM, for vLLM and others), official (GLM's own layout and names), "
        "prefix (the official prefix_encoder file alone), "
        "tuned (the prefix or LoRA alone, as glmtune and PEFT read them), "
        "peft (the LoRA alone, for PEFT, vLLM and llama.cpp beside a format=transformers export), "
        "or gguf (one file for llama.cpp, and a Modelfile for Ollama)",
    )
    output_dir: str | None = setting(None, "folder to appear; default: runs/export-MODEL-FORMAT")
    prefix_path: str | None = setting(None, "tuned prefix: a run folder, one of its checkpoints, or a file")
    prefix_strength: float = setting(1.0, f"{STRENGTH_HELP}; another than 1 with format=tuned")
    adapter_path: str | None = setting(
        None, "LoRA adapter: a run folder or one of its checkpoints; merged, or alone with tuned and peft"
    )
    adapter_scale: float = setting(1.0, SCALE_HELP)
    dtype: str = setting("auto", "type of the weights: auto (as stored), float32, bfloat16 or float16")
    gguf_type: str = setting(
        DEFAULT_TYPE,
        "type of the weights with format=gguf: F32, F16, BF16, Q8_0 (8 bits), Q4_K_M or Q4_0 (4 bits; Q4_K_M "
        "loses less)",
    )
    max_shard_mib: int = setting(MAX_SHARD_MIB, "largest weight file, MiB; about as much memory is needed")
    overwrite: bool = setting(False, "replace an earlier export in output_dir; other folders never are")
    keep_chat_template: bool = setting(
        False,
        "copy on the chat template of the model (Jinja, which other tools run); format=official",
    )

    def __post_init__(self) -> None:
        """Check what needs no file.

        Raises:
            ConfigError: a value is not allowed.
        """
        check_choice("format", self.format, FORMATS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("gguf_type", self.gguf_type, FILE_TYPES)
        check_range("max_shard_mib", self.max_shard_mib, low=1)
        if self.model.source is None:
            raise ConfigError(
                "`model.source` is null, but an export needs a base. Add `model=NAME_OR_FOLDER`."
            )
        if self.keep_chat_template and self.format != "official":
            raise ConfigError(
                f"`keep_chat_template` is true, but `format={self.format}` writes no template of the model: "
                "transformers gets one of ours. Use `format=official`, or leave it out."
            )
        self._check_gguf()
        if self.format in ("prefix", "tuned", "peft") and self.dtype != "auto":
            as_tuned = "float32 as the official script does" if self.format == "prefix" else "what was tuned"
            raise ConfigError(
                f"`dtype` is `{self.dtype}`, but `format={self.format}` writes {as_tuned}. Leave `dtype` out."
            )

    def _check_gguf(self) -> None:
        """Raise ConfigError for settings that have no meaning with this format."""
        if self.format != "gguf":
            if self.gguf_type != DEFAULT_TYPE:
                raise ConfigError(
                    f"`gguf_type` is `{self.gguf_type}`, but `format={self.format}` writes no GGUF file. Use "
                    "`format=gguf`, or leave it out."
                )
            return
        if self.dtype != "auto":
            raise ConfigError(
                f"`dtype` is `{self.dtype}`, but `format=gguf` writes what `gguf_type` says, "
                f"{self.gguf_type} here. Leave `dtype` out."
            )
        if self.max_shard_mib != MAX_SHARD_MIB:
            raise ConfigError(
                f"`max_shard_mib` is {self.max_shard_mib}, but `format=gguf` writes one file, a tensor at a "
                "time. Leave it out."
            )


def run(config: ExportConfig) -> Exported:
    """Export, and print what was written and how near it is to its source.

    Args:
        config: all settings.

    Returns:
        The export.

    Raises:
        GlmtuneError: see ``glmtune.export.export.export``.
    """
    import torch

    from glmtune.export.export import export
    from glmtune.export.source import ExportJob
    from glmtune.terminal.console import Console

    source = str(config.model.source)
    default = Path("runs") / f"export-{portable_name(last_part(source))}-{config.format}"
    job = ExportJob(
        source=source,
        format=config.format,
        output_dir=Path(config.output_dir) if config.output_dir else default,
        family=config.model.family,
        prefix_path=config.prefix_path,
        adapter_path=config.adapter_path,
        dtype=None if config.dtype == "auto" else getattr(torch, config.dtype),
        max_shard_bytes=config.max_shard_mib * MEBIBYTE,
        overwrite=config.overwrite,
        keep_chat_template=config.keep_chat_template,
        prefix_strength=config.prefix_strength,
        adapter_scale=config.adapter_scale,
        gguf_type=config.gguf_type,
    )
    with ExitStack() as open_stage:
        exported = export(job, _stage_progress(open_stage))
    console = Console()
    for line in (
        f"reloaded and compared: logits differ by at most {exported.max_difference:.2e} "
        f"(allowed {exported.limit:.2e}; largest logit {exported.max_logit:.2f})",
        f"Written: {exported.folder} ({exported.num_bytes / MEBIBYTE:,.1f} MiB, {exported.dtype})",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if (halves := exported.folder / "vllm").is_dir() and config.format == "peft":
        line = f"for vLLM where it has gate_up_proj as two layers (glm4): {halves}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if exported.left_out:
        console.print(f"! {exported.left_out}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"next: {_next_command(config, exported.folder)}", markup=False, highlight=False, soft_wrap=True
    )
    return exported


def _next_command(config: ExportConfig, folder: Path) -> str:
    """Word what one types next: see that the export answers."""
    from glmtune.command_line import command_words, model_words
    from glmtune.export.gguf.folder import model_name

    if config.format in ("prefix", "tuned", "peft"):
        model = model_words({"source": config.model.source})
        kind = "adapter_path" if config.prefix_path is None else "prefix_path"
        return command_words("predict", {kind: str(folder), **model, "data": "ads"})
    if config.format == "gguf":
        file = folder / f"{model_name(str(config.model.source))}-{config.gguf_type}.gguf"
        return f"llama-cli -m {shlex.quote(str(file))} --jinja"
    return command_words("info", model_words({"source": folder}))


def _stage_progress(open_stage: ExitStack) -> OnProgress:
    """Show the stages of an export one after the other; the last one is left with ``open_stage``."""
    from glmtune.terminal.progress import Meter

    meters: dict[str, Meter] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in meters:
            open_stage.close()  # the stage before
            meters[stage] = open_stage.enter_context(Meter(stage, total=total, unit="steps"))
        meters[stage].update(done, total=total)

    return show


COMMAND = Command(
    name="export",
    summary="Write base + prefix or LoRA as a folder that transformers, vLLM or the official tools read.",
    schema=ExportConfig,
    run=run,
    examples=(
        "glmtune export adapter_path=runs/lora output_dir=runs/lora-merged",
        "glmtune export model=chatglm3-6b format=transformers output_dir=chatglm3-6b-native",
        "glmtune export format=gguf gguf_type=Q4_K_M output_dir=exports/glm-tiny-gguf",
        "glmtune export format=tuned prefix_path=runs/ads prefix_strength=0.5 output_dir=runs/ads-half",
        "glmtune export model=chatglm2-6b format=prefix prefix_path=runs/adgen output_dir=adgen-official",
    ),
)
