"""Decide whether a command needs several processes, and start them, here or on other machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmtune.training.distributed.hosts import launch_on_hosts
from glmtune.training.distributed.launch import LaunchSettings, launch, node_of, num_processes


def start(
    command: str, values: Mapping[str, Any], settings: LaunchSettings, *, device: str, always: bool
) -> int | None:
    """Start the processes of a command, if it needs any besides this one.

    Args:
        command: such as ``train``.
        values: all its settings.
        settings: how many processes, and where.
        device: the setting ``model.device``.
        always: start them even if one is enough (DeepSpeed wants to be started).

    Returns:
        See ``launch``; None where this process is to do the work itself.

    Raises:
        ConfigError: the settings do not fit this machine; so does what ``launch`` raises.
    """
    if settings.hostfile is not None:
        return launch_on_hosts(command, values, settings)
    count = num_processes(settings, device)
    if count == settings.num_nodes == 1 and not always:
        return None
    return launch(command, values, node_of(settings, count))
