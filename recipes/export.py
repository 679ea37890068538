"""`glmtune export`: base + prefix or adapter, as a folder that other tools read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glmtune.errors import ConfigError
from glmtune.models.settings import DTYPES, CheckpointSettings
from glmtune.settings import check_choice, check_range, setting
from recipes.compose import Command

if TYPE_CHECKING:
    from glmtune.export.export import Exported

FORMATS = ("transformers", "official", "prefix")
MEBIBYTE = 2**20


@dataclass(frozen=True)
class ExportConfig:
    """What to export, and into which form."""

    model: CheckpointSettings = setting(CheckpointSettings, "the base model")
    format: str = setting(
        "transformers",
        "transformers (GlmForCausalLM, for vLLM and others), official (GLM's own layout and names), "
        "or prefix (the official prefix_encoder file alone)",
    )
    output_dir: str | None = setting(None, "folder to appear; default: runs/export-MODEL-FORMAT")
    prefix_path: str | None = setting(None, "tuned prefix: a run folder, one of its checkpoints, or a file")
    adapter_path: str | None = setting(
        None, "LoRA adapter: a run folder or one of its checkpoints; merged into the weights"
    )
    dtype: str = setting("auto", "type of the weights: auto (as stored), float32, bfloat16 or float16")
    max_shard_mib: int = setting(2048, "largest weight file, MiB; about as much memory is needed")
    overwrite: bool = setting(False, "replace an earlier export in output_dir; other folders never are")

    def __post_init__(self) -> None:
        """Check what needs no file.

        Raises:
            ConfigError: a value is not allowed.
        """
        check_choice("format", self.format, FORMATS)
        check_choice("dtype", self.dtype, DTYPES)
        check_range("max_shard_mib", self.max_shard_mib, low=1)
        if self.model.source is None:
            raise ConfigError(
                "`model.source` is null, but an export needs a base. Add `model=NAME_OR_FOLDER`."
            )
        if self.format == "prefix" and self.dtype != "auto":
            raise ConfigError(
                f"`dtype` is `{self.dtype}`, but `format=prefix` writes float32 as the official script does. "
                "Leave `dtype` out."
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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from glmtune.export.export import STAGES, ExportJob, export

    source = str(config.model.source)
    default = Path("runs") / f"export-{Path(source).name}-{config.format}"
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
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {stage: bar.add_task(stage, total=None) for stage in STAGES}
        exported = export(
            job, lambda stage, done, total: bar.update(tasks[stage], completed=done, total=total)
        )
    console = Console()
    for line in (
        f"reloaded and compared: logits differ by at most {exported.max_difference:.2e} "
        f"(allowed {exported.limit:.2e}; largest logit {exported.max_logit:.2f})",
        f"Written: {exported.folder} ({exported.num_bytes / MEBIBYTE:,.1f} MiB, {exported.dtype})",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return exported


COMMAND = Command(
    name="export",
    summary="Write base + prefix or LoRA as a folder that transformers, vLLM or the official tools read.",
    schema=ExportConfig,
    run=run,
    examples=(
        "glmtune export adapter_path=runs/lora output_dir=runs/lora-merged",
        "glmtune export model=chatglm3-6b format=transformers output_dir=chatglm3-6b-native",
        "glmtune export model=chatglm2-6b format=prefix prefix_path=runs/adgen output_dir=adgen-official",
    ),
)
