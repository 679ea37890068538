"""The prefixes and LoRAs that an engine holds beside its base, each of which a request may name.

A prefix is keys and values: rows with different ones, and of different strengths, run in one pass. A LoRA
changes layers, so that the rows of each LoRA and scale need a pass of their own, for which the layers that
PEFT made take the place of the plain ones. Outside such a pass the model is as it was, and a batch without
LoRAs costs what it would without any of this.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glmtune.adapter.load import adapter_sha256, find_adapter, load_adapter, scale_layer
from glmtune.errors import ConfigError, unknown_name
from glmtune.inference.engine.model import EngineModel
from glmtune.inference.engine.states.rows import PrefixStates
from glmtune.inference.requests.engine_state import AdapterInfo, NoSuchAdapterError
from glmtune.inference.requests.request import Request
from glmtune.prefix.attach import prefix_of
from glmtune.prefix.checkpoint import load_prefix
from glmtune.switch.model import detach_switch, switch_of
from glmtune.switch.rule import Switch

MAX_STRENGTHS = 64
"""Of one adapter, remembered: rows of the same strength then share one object, which is told by identity."""


@dataclass(frozen=True, slots=True)
class RowAdapter:
    """What a row runs with.

    Attributes:
        prefix: in front of its tokens.
        lora: whose layers it passes through.
        cache_key: equal where the same tokens give the same keys and values.
        switch: decides for each row whether it runs with that, or as the base.
    """

    prefix: PrefixStates | None = None
    lora: HeldLora | None = None
    cache_key: str = ""
    switch: Switch | None = None

    @property
    def num_columns(self) -> int:
        """Columns in front of the row's own tokens."""
        return self.prefix.num_columns if self.prefix else 0


BASE = RowAdapter()
"""Of requests that name no adapter."""


@dataclass(eq=False)
class HeldPrefix:
    """A prefix, its keys and values in the model's type.

    Attributes:
        info: what it is.
        states: at strength 1.
        switch: decides for each row; None: it applies to all that ask for it.
    """

    info: AdapterInfo
    states: PrefixStates
    switch: Switch | None = None
    _strengths: dict[float, RowAdapter] = field(default_factory=dict[float, RowAdapter])

    def of_strength(self, strength: float) -> RowAdapter:
        """Return what rows with this strength run with.

        Raises:
            ConfigError: it is negative or no number.
        """
        return _of_strength(self.info, strength, self._strengths, self._at)

    def _at(self, strength: float, cache_key: str) -> RowAdapter:
        states = PrefixStates(self.states.layers, self.states.strength * strength)
        if self.states.gates is not None:  # of a gated prefix, the strength is a factor of its gates
            gates = [gate * strength for gate in self.states.gates]
            states = PrefixStates(self.states.layers, gates=gates)
        return RowAdapter(states, cache_key=cache_key, switch=self.switch)


def _of_strength(
    info: AdapterInfo,
    strength: float,
    known: dict[float, RowAdapter],
    make: Callable[[float, str], RowAdapter],
) -> RowAdapter:
    """Return what rows run with at a strength: the one object that all of them share, or the base."""
    if not (math.isfinite(strength) and strength >= 0):
        what = "strength of prefix" if info.kind == "prefix" else "scale of LoRA"
        raise ConfigError(
            f"The {what} `{info.name}` is {strength}, but it must be at least 0 and finite (0 is the base, 1"
            " is as tuned)."
        )
    if strength == 0:
        return BASE
    if strength not in known:
        if len(known) >= MAX_STRENGTHS:
            known.clear()
        known[strength] = make(strength, f"{info.content_hash}:{strength!r}")
    return known[strength]


@dataclass(frozen=True, slots=True)
class _Swap:
    """A layer that PEFT wrapped: where it stands, as it was, and with the adapter."""

    parent: nn.Module
    name: str
    plain: nn.Module | None
    adapted: nn.Module | None


@dataclass(eq=False)
class HeldLora:
    """A LoRA, beside the model but for its passes; rows of another scale have a pass of their own.

    Attributes:
        info: what it is.
        switch: decides for each row; None: it applies to all that ask for it.
        scale: what its product is multiplied by.
    """

    info: AdapterInfo
    _swaps: tuple[_Swap, ...]
    switch: Switch | None = None
    scale: float = 1.0
    _scales: dict[float, RowAdapter] = field(default_factory=dict[float, RowAdapter])

    def of_strength(self, strength: float) -> RowAdapter:
        """Return what rows with this scale run with.

        Raises:
            ConfigError: it is negative or no number.
        """
        return _of_strength(self.info, strength, self._scales, self._at)

    def _at(self, scale: float, cache_key: str) -> RowAdapter:
        # The layers are the same for all scales: only the factor in them changes, when a pass begins.
        lora = HeldLora(self.info, self._swaps, self.switch, scale)
        return RowAdapter(lora=lora, cache_key=cache_key, switch=self.switch)

    def activate(self) -> None:
        """Put the adapted layers into the model, scaled."""
        for swap in self._swaps:
            if swap.adapted is not None:
                scale_layer(swap.adapted, self.scale)
            swap.parent._modules[swap.name] = swap.adapted

    def deactivate(self) -> None:
        """Put the plain layers back."""
        for swap in self._swaps:
            swap.parent._modules[swap.name] = swap.plain


def adapter_of(request: Request, held: Mapping[str, Held], model: EngineModel) -> RowAdapter:
    """Return what a request names.

    Args:
        request: what is asked.
        held: by name.
        model: tells whether something is attached that would be obeyed for some prompts only.

    Raises:
        ConfigError: no such strength; what is attached to the model has a switch.
        NoSuchAdapterError: no adapter of that name.
    """
    if not request.adapter:
        if switch_of(model.base) is not None:
            raise ConfigError(
                "The model of the engine carries a prefix or LoRA with a switch, which decides for each "
                "request, and requests of an engine obey the switches of adapters that they name. Load the "
                "base alone and add it by name (`engine.add_adapter`), or set `model.use_switch = False`."
            )
        return BASE
    if request.adapter not in held:
        raise no_such(request.adapter, held)
    return held[request.adapter].of_strength(request.strength)


def no_such(name: str, held: Collection[str]) -> NoSuchAdapterError:
    """Return the error for a name that no adapter has."""
    if not held:
        return NoSuchAdapterError(f"The engine holds no adapter `{name}`: none was added. Add it first.")
    return NoSuchAdapterError(unknown_name("`adapter`", name, held))


def beginning(adapter: RowAdapter, *, use_switch: bool) -> tuple[RowAdapter, RowAdapter | None]:
    """Return what a row begins with, and what it runs with if a switch says so; None: it does already."""
    if adapter.switch is None or not use_switch:
        return adapter, None
    return BASE, adapter


@contextmanager
def active_layers(lora: HeldLora | None) -> Generator[None]:
    """Compute with the layers of a LoRA for the time of a pass; None: with the model as it is."""
    if lora is None:
        yield
        return
    try:
        lora.activate()
        yield
    finally:
        lora.deactivate()


Held = HeldPrefix | HeldLora


def module_tree(model: nn.Module) -> ModuleTree:
    """Copy which module holds which; modules without others in them, and all weights, are the model's own.

    What wraps modules of the copy leaves the model as it is: so a LoRA is read while the model computes.
    """
    twins: dict[int, nn.Module] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def twin(module: nn.Module) -> nn.Module:
        if not module._modules:
            return module
        if id(module) not in twins:
            twins[id(module)] = found = copy.copy(module)
            pairs.append((module, found))
            found._modules = {name: child and twin(child) for name, child in module._modules.items()}
        return twins[id(module)]

    return ModuleTree(twin(model), tuple(pairs), twins)


@dataclass(frozen=True, slots=True)
class ModuleTree:
    """A model's modules, copied by `module_tree`.

    Attributes:
        model: the copy.
        pairs: every module that holds others, and its copy.
        twins: the copies, by `id` of the module.
    """

    model: Any
    pairs: tuple[tuple[nn.Module, nn.Module], ...]
    twins: dict[int, nn.Module]

    def swaps(self) -> tuple[_Swap, ...]:
        """Return where something else stands in the copy by now than in the model."""
        return tuple(
            _Swap(module, name, child, found._modules[name])
            for module, found in self.pairs
            for name, child in module._modules.items()
            if child is not None and found._modules[name] is not self.twins.get(id(child), child)
        )


def hold_prefix(
    model: EngineModel, tree: ModuleTree, name: str, path: str | Path, *, use_switch: bool
) -> HeldPrefix:
    """Load a prefix; the model stays as it is.

    Args:
        model: the base it must have been tuned on.
        tree: of the base.
        name: how requests will name it.
        path: as for `load_prefix`.
        use_switch: hold its switch, too, if it has one.

    Raises:
        CheckpointError: it cannot be read or does not belong to the model, with file and reason.
        ConfigError: a prefix is attached to the model.
    """
    if prefix_of(tree.model) is not None:
        raise ConfigError(
            f"Prefix `{name}` cannot be added: another one is attached to the model, which all requests would"
            " see as well. Call `glmtune.detach_prefix(model)` first and add that one by name, too."
        )
    encoder = load_prefix(path, tree.model)
    digest = hashlib.sha256(f"prefix {encoder.pre_seq_len} {encoder.strength!r}".encode())
    for key, weight in sorted(encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(weight.contiguous().numpy().tobytes())
    with torch.no_grad():
        layers = encoder.eval().layer_states(1, model.dtype)
        layers = tuple(
            (keys.to(device).contiguous(), values.to(device).contiguous())
            for device, (keys, values) in zip(model.layer_devices, layers, strict=True)
        )
        gates = encoder.layer_gates(encoder.strength)
        if gates is not None:
            gates = tuple(gate.to(device) for gate, device in zip(gates, model.layer_devices, strict=True))
    switch = encoder.switch if use_switch else None
    facts = None if switch is None else switch.facts
    info = AdapterInfo(name, "prefix", str(path), digest.hexdigest(), encoder.pre_seq_len, facts)
    strength = encoder.strength if gates is None else 1.0
    return HeldPrefix(info, PrefixStates(layers, strength, gates=gates), switch)


def hold_lora(
    model: EngineModel, tree: ModuleTree, name: str, path: str | Path, *, use_switch: bool
) -> HeldLora:
    """Load a LoRA; the model is as it was all the time, and may compute meanwhile.

    Args:
        model: the base it must have been tuned on.
        tree: of the base; mutated.
        name: how requests will name it.
        path: as for `load_adapter`.
        use_switch: hold its switch, too, if it has one.

    Raises:
        CheckpointError: it cannot be read or does not belong to the model, with file and reason.
        ConfigError: the model was wrapped by PEFT already.
    """
    if hasattr(tree.model, "peft_config"):
        raise ConfigError(
            f"LoRA `{name}` cannot be added: the model already carries one in its layers, which all requests"
            " would see as well. Load the base alone and add that one by name, too."
        )
    folder = find_adapter(path)
    trained = [(weight, weight.requires_grad) for weight in model.base.parameters()]
    try:
        load_adapter(path, tree.model)
    finally:
        for weight, flag in trained:  # PEFT freezes what it wraps, and the weights are the model's
            weight.requires_grad_(flag)
    switch = switch_of(tree.model) if use_switch else None
    detach_switch(tree.model)  # its hooks are for `model.generate`: here rows of a LoRA have their own passes
    facts = None if switch is None else switch.facts
    info = AdapterInfo(name, "lora", str(path), adapter_sha256(folder), switch=facts)
    return HeldLora(info, tree.swaps(), switch)
