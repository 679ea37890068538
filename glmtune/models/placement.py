"""A model split by layers over several devices of one machine, as `load_model_on_gpus` of the releases does.

::

    first device    embedding, positions, layers 0..k, final norm, head
    second device                          layers k+1..m
    ...

Layers in order, so that the hidden state crosses from device to device once per pass. Embedding, norm and
head stay together on the first: the head may be the embedding's matrix, and whoever decodes finds the scores
where the prompt was. Layers are cut so that all devices are filled to the same share; a layer is never cut.
Nothing is put on the CPU or on disk beside: such layers would be copied to a GPU at every token.

Weights are read to their devices at once, and a hook on every part moves its inputs there. accelerate's
`dispatch_model` would do it by a hook on every module, which also moves parameters again: layers of codes
hold some of theirs elsewhere (`glmtune.quantization.layers.linear`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import convert_file_size_to_int, send_to_device
from torch import Tensor, nn

from glmtune.errors import ConfigError
from glmtune.memory import free_bytes
from glmtune.models.devices import choose_device, count_devices
from glmtune.models.settings import SPLITS

USABLE_FRAC = 0.9
"""Of a device's free memory; the rest is for caches and activations."""
NOT_MOVED = ["cache", "past_key_values", "prefix_key_values", "prefix_gates", "engine_states"]
"""Keyword arguments of a layer that hold parts for every layer, each on its own device already."""
OFFICIAL_NAMES = (
    (r"transformer\.encoder\.layers", "model.layers"),
    (r"transformer\.embedding(\.word_embeddings)?", "model.embed_tokens"),
    (r"transformer\.encoder\.final_layernorm", "model.norm"),
    (r"transformer\.output_layer", "lm_head"),
    (r"transformer\.rotary_pos_emb", "model.rotary_emb"),
)
"""Modules of ChatGLM2 and later by their official names, which device maps of the official demos use."""
LAYER = re.compile(r"(.*\blayers)\.(\d+)")

Devices = dict[str, torch.device]
"""Name of a module (``""``: the model) → where all of it lies."""
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Placement:
    """How a model is split; made by `parse_placement`.

    Attributes:
        devices: in the order in which layers fill them.
        device_map: one of `SPLITS`, or modules by name.
        capacities: bytes per device; empty where the map names modules.
    """

    devices: tuple[torch.device, ...]
    device_map: str | Devices
    capacities: tuple[int, ...] = field(default=())

    @property
    def first(self) -> torch.device:
        """Where prompts go in and scores come out."""
        return self.devices[0]


def parse_placement(
    device_map: Any, *, num_gpus: int | None = None, max_memory: Mapping[Any, int | str] | None = None
) -> Placement | torch.device:
    """Turn what users write into a placement, or into the one device that is enough for it.

    Args:
        device_map: one of `SPLITS`; a device, its name or number; or modules and their devices by name.
        num_gpus: how many devices, at most; None: all there are.
        max_memory: bytes, or text such as ``"20GiB"``, per device (number or name); others are not used.
            None: `USABLE_FRAC` of what is free.

    Raises:
        ConfigError: no such device or split; a map that mixes a device with the CPU or the disk.
    """
    if isinstance(device_map, Mapping):
        if num_gpus is not None or max_memory:
            raise ConfigError(
                "`device_map` names a device for every module, and `num_gpus` or `max_memory` asks to choose "
                "them. Give one of the two."
            )
        return _of_modules({str(name): _device(place) for name, place in device_map.items()})
    if isinstance(device_map, int | torch.device) or str(device_map) not in SPLITS:
        if isinstance(device_map, str) and not re.match(r"cpu|cuda|npu|xpu|mps", device_map):
            raise ConfigError(
                f"`device_map` is `{device_map}`, but it must be one of {', '.join(SPLITS)}, a device "
                "(`cuda:0`), or a dictionary from modules to devices. Write `auto`."
            )
        return choose_device(str(_device(device_map)))
    kind = choose_device(None).type
    number = count_devices(kind) if kind != "cpu" else 0
    if num_gpus is not None and num_gpus > max(number, 1):
        raise ConfigError(
            f"`num_gpus` is {num_gpus}, but PyTorch sees {number} here. Lower it, or leave it out to use all."
        )
    if number <= 1 or num_gpus == 1:
        return torch.device(kind)
    devices = [torch.device(kind, index) for index in range(num_gpus or number)]
    limits = {_device(place): size for place, size in (max_memory or {}).items()}
    if limits:
        devices = [device for device in devices if device in limits]
    if not devices:
        raise ConfigError(
            f"`max_memory` names {', '.join(map(str, limits))}, but none of the {number} {kind} devices "
            "here. Name them by number: {0: '20GiB', 1: '20GiB'}."
        )
    capacities = tuple(_bytes(limits[device]) if limits else _free_bytes(device) for device in devices)
    return Placement(tuple(devices), str(device_map), capacities)


def _of_modules(places: Devices) -> Placement | torch.device:
    devices = list(dict.fromkeys(places.values()))
    if not devices:
        raise ConfigError("`device_map` is empty. Write `auto`, or name a device for every module.")
    for device in devices:
        if device.type != "cpu":
            choose_device(str(device))  # is it there?
    if len(devices) == 1:
        return devices[0]
    if torch.device("cpu") in devices:
        raise ConfigError(
            f"`device_map` mixes {' and '.join(map(str, devices))}, but layers on the CPU or on disk would "
            "be copied to a GPU at every token. Use `quantization='int4'`, which needs a quarter of the "
            "memory."
        )
    return Placement(tuple(devices), places)


def _device(place: Any) -> torch.device:
    """Return a device from its name or number; a number counts devices of the kind that there is."""
    if isinstance(place, int):
        kind = choose_device(None).type
        return torch.device("cuda" if kind == "cpu" else kind, place)
    try:
        return torch.device(place)
    except (RuntimeError, TypeError):
        raise ConfigError(
            f"`device_map` names the device `{place}`, which is none (`disk` included: nothing is put "
            "there). Name devices like `cuda:0`, or by number."
        ) from None


def _bytes(size: int | str) -> int:
    try:
        return convert_file_size_to_int(size)
    except ValueError:
        raise ConfigError(
            f"`max_memory` has the size `{size}`, but it must be bytes, or text such as `20GiB`. Correct it."
        ) from None


def _free_bytes(device: torch.device) -> int:
    return int(USABLE_FRAC * free_bytes(device))


def plan_placement(model: nn.Module, placement: Placement, dtype: torch.dtype) -> Devices:
    """Decide where every part of a model lies.

    Args:
        model: may be on the meta device.
        placement: how.
        dtype: floating type that the model will have.

    Returns:
        The parts (layers, and what is beside them) and their devices; nothing is left out.

    Raises:
        ConfigError: the devices are too small, or a map leaves a module out or names none.
    """
    layers, others = _parts(model)
    if isinstance(placement.device_map, dict):
        return _named(placement.device_map, [*layers, *others], model)
    sizes = [_size([model.get_submodule(name)], dtype) for name in layers]
    fixed = _size([model.get_submodule(name) for name in others], dtype)
    counts = _cut(sizes, fixed, placement.capacities, is_even=placement.device_map != "sequential")
    if counts is None:
        raise ConfigError(
            f"The model needs {(sum(sizes) + fixed) / 1e9:.1f} GB ({fixed / 1e9:.1f} of them on the first "
            f"device), but the {len(placement.devices)} devices have room for "
            f"{', '.join(f'{size / 1e9:.1f}' for size in placement.capacities)} GB. Use "
            "`quantization='int4'`, or raise `max_memory`."
        )
    places = dict.fromkeys(others, placement.first)
    remaining = iter(layers)
    for device, count in zip(placement.devices, counts, strict=True):
        places |= {next(remaining): device for _ in range(count)}
    return places


def _parts(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the layers, and of all else that holds tensors of its own."""
    layers, others = [], []
    for name, module in model.named_modules():
        found = LAYER.match(name)
        if found is not None and found[0] == name:
            layers.append(name)
        elif found is None and [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            others.append(name)
    return layers, others


def _named(asked: Devices, parts: Iterable[str], model: nn.Module) -> Devices:
    """Look every part up in a user's map, in which a module stands for all that is in it."""
    known = {name for name, _ in model.named_modules()}
    asked = {_native_name(name, known): device for name, device in asked.items()}
    if wrong := [name for name in asked if name not in known]:
        raise ConfigError(
            f"`device_map` names `{wrong[0]}`, but the model has no such module. Its parts are "
            f"{', '.join(name for name, _ in model.named_children())} and those in them; or write `auto`."
        )
    places: Devices = {}
    for part in parts:
        owners = [name for name in asked if name in ("", part) or part.startswith(f"{name}.")]
        if not owners and "rotary" not in part:
            raise ConfigError(
                f"`device_map` says nothing of `{part}`. Name a device for every module, or write `auto`."
            )
        places[part] = asked[max(owners, key=len)] if owners else next(iter(asked.values()))
    ends = {part: device for part, device in places.items() if not LAYER.match(part)}
    if len(set(ends.values())) > 1:
        raise ConfigError(
            "`device_map` puts what is beside the layers on several devices "
            f"({', '.join(f'{part}: {device}' for part, device in ends.items())}), but embedding, final norm "
            "and head must lie on one: a prompt goes in where its scores come out. Give them one device."
        )
    return places


def _native_name(name: str, known: set[str]) -> str:
    if name in known:
        return name
    for official, native in OFFICIAL_NAMES:
        renamed = re.sub(rf"^{official}(?=\.|$)", native, name)
        if renamed != name:
            return renamed
    return name


def _size(modules: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """Return bytes, tensors that are held twice counted once."""
    tensors: dict[int, Tensor] = {}
    for module in modules:
        tensors |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    widths = ((tensor, dtype if tensor.is_floating_point() else tensor.dtype) for tensor in tensors.values())
    return sum(tensor.numel() * width.itemsize for tensor, width in widths)


def _cut(
    sizes: list[int], fixed: int, capacities: tuple[int, ...], *, is_even: bool
) -> tuple[int, ...] | None:
    """Return how many layers go on each device, None where they do not fit.

    Evenly: the smallest share of every capacity at which filling one device after the other holds all.
    Halving the interval twenty times finds it to a millionth.
    """
    counts = _filled(sizes, fixed, capacities, 1.0)
    if counts is None or not is_even:
        return counts
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        found = _filled(sizes, fixed, capacities, middle)
        low, high, counts = (middle, high, counts) if found is None else (low, middle, found)
    return counts


def _filled(
    sizes: list[int], fixed: int, capacities: tuple[int, ...], share: float
) -> tuple[int, ...] | None:
    counts, place = [0] * len(capacities), 0
    room = capacities[0] * share - fixed
    if room < 0:
        return None
    for size in sizes:
        while room < size:
            place += 1
            if place == len(capacities):
                return None
            room = capacities[place] * share
        room -= size
        counts[place] += 1
    return tuple(counts)


def allocate(model: nn.Module, places: Devices, dtype: torch.dtype) -> None:
    """Give a model of the meta device memory, in its final type and where it will lie; codes keep their type.

    Args:
        model: mutated.
        places: of `plan_placement`, or ``{"": device}``.
        dtype: floating type.
    """
    for name, device in places.items():

        def allocated(tensor: Tensor, device: torch.device = device) -> Tensor:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            return torch.empty_like(tensor, dtype=kind, device=device)

        model.get_submodule(name)._apply(allocated)


def dispatch(model: _Model, places: Devices) -> _Model:
    """Let a model whose parts lie on several devices run: inputs of every part are moved to it.

    Args:
        model: its weights are where ``places`` says; mutated.
        places: of `plan_placement`.

    Returns:
        The model, with ``hf_device_map`` as transformers' loader leaves it.
    """
    for name, device in places.items():
        moves = functools.partial(_move_inputs, device)  # no closure: copies and pickles keep the hook
        model.get_submodule(name).register_forward_pre_hook(moves, with_kwargs=True)
    cast(Any, model).hf_device_map = {name: str(device) for name, device in places.items()}
    return model


def layer_devices(model: nn.Module) -> tuple[torch.device, ...]:
    """Return the device of every layer; those of a model that is not split lie where its embedding does."""
    config: Any = model.config
    places: Mapping[str, str] = getattr(model, "hf_device_map", {})
    found = {int(match[2]): torch.device(places[name]) for name in places if (match := LAYER.fullmatch(name))}
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    home: torch.device = embedding.weight.device
    return tuple(found.get(layer, home) for layer in range(config.num_hidden_layers))


def _move_inputs(
    device: torch.device, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of a part."""
    del module
    moved: Any = send_to_device(kwargs, device, skip_keys=NOT_MOVED)
    return send_to_device(args, device), moved
