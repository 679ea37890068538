"""How a checkpoint stores quantized weights: which of them are codes with scales, and in what shapes.

Only names, shapes and keys of config.json are known here. The arithmetic is in `glmtune.quantization`, a
floor above: a loader is handed it as a `Quantizer` (see quantizer.py).
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glmtune.errors import CheckpointError

LAYOUT_KEY = "glmtune_quantization"
"""Key we write into config.json of every quantized folder, official formats included."""
OUR_CODES = {"made_by": "glmtune, which alone reads these codes; `glmtune export` makes weights of them"}
"""``quantization_config`` of quantized folders that only we read. It names no ``quant_method``, at which
transformers stops: of a method that it does not know it only warns, and takes codes of 8 bits for weights."""
OFFICIAL_BITS = (4, 8)
"""The widths that the released code can read."""
BLOCK_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""Official names of the linear layers of a block, the ones that are quantized."""
TRANSFORMERS_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
"""The same in transformers' format."""
OUTER_MATRICES = ("word_embeddings", "embed_tokens", "output_layer", "lm_head")
"""Names of embedding and head in either format."""
INT8_EMBEDDINGS = "int8"
"""What `QuantizedLayout.embeddings` is where embedding and head are INT8, whatever the blocks are."""
SCALE, ZERO = "weight_scale", "weight_zero"


@dataclass(frozen=True, slots=True)
class QuantizedLayout:
    """What a quantized checkpoint holds.

    Attributes:
        bits: 8, or 4: two codes per byte, so half the columns are stored.
        group_size: columns that share a scale; None: one scale per row, as in the official formats.
        has_zero: every group has a zero point beside its scale.
        embeddings: True: the embedding (and the head tied to it) is stored so, too; first generation only.
            `INT8_EMBEDDINGS`: embedding and head are INT8 with a scale per row beside these blocks.
        skipped: official names of linear layers left as they were.
        method: name in `glmtune.quantization.arithmetic.methods`.
        source_fingerprint: of the weights before quantization; empty where nothing tells it.
        outer_signs: with `INT8_EMBEDDINGS`: ``embedding`` or ``head`` → the signs sampled of its weight
            before (`packed_signs`), which enter the fingerprint in the place of the codes.
    """

    bits: int
    group_size: int | None = None
    has_zero: bool = False
    embeddings: bool | str = False
    skipped: tuple[str, ...] = ()
    method: str = ""
    source_fingerprint: str = ""
    outer_signs: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def is_official(self) -> bool:
        """Whether the released code reads it."""
        is_plain = self.group_size is None and not self.has_zero and not self.skipped
        return is_plain and not self.has_int8_embeddings

    @property
    def has_int8_embeddings(self) -> bool:
        """Whether embedding and head are INT8 beside blocks that may be of another width."""
        return self.embeddings == INT8_EMBEDDINGS

    @property
    def embeddings_method(self) -> str | None:
        """Name of the method of embedding and head, None where they are floating point."""
        if not self.embeddings:
            return None
        return INT8_EMBEDDINGS if self.has_int8_embeddings else self.method or f"int{self.bits}"

    @property
    def name(self) -> str:
        """The method as users see it: `-e8` behind it says that embedding and head are INT8, too."""
        return f"{self.method}-e8" if self.has_int8_embeddings else self.method

    @property
    def of_base(self) -> QuantizedLayout:
        """The layout with embedding and head in floating point, where they are INT8.

        Fingerprints are made of it: what was tuned over the one fits the other, as where embedding and head
        are rounded in memory (`glmtune.quantization.layers.embeddings`).
        """
        return dataclasses.replace(self, embeddings=False) if self.has_int8_embeddings else self

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the results beside the codes themselves; enters the fingerprint.

        The method is left out: how codes were found does not matter once they are there.
        """
        origin = ("method", "source_fingerprint", "outer_signs")
        return {name: value for name, value in self.of_base.plain().items() if name not in origin}

    def plain(self) -> dict[str, Any]:
        """Return plain values, as JSON holds them; `from_plain` reads them."""
        values = dataclasses.asdict(self) | {"skipped": list(self.skipped)}
        values["outer_signs"] = dict(self.outer_signs)
        if not self.outer_signs:  # files without keep the keys that they always had
            del values["outer_signs"]
        return values

    def of_layer(self, module: str) -> QuantizedLayout:
        """Return how one layer that is stored as codes is: most are as the layout says.

        Args:
            module: its name, of which the end tells embedding and head.
        """
        if self.has_int8_embeddings and module.rpartition(".")[2] in OUTER_MATRICES:
            return QuantizedLayout(8, method=INT8_EMBEDDINGS)
        return self

    def holds(self, module: str) -> bool:
        """Say whether a layer is stored as codes.

        Args:
            module: its name in the checkpoint, such as ``transformer.encoder.layers.0.mlp.dense_4h_to_h``.
        """
        kind = module.rpartition(".")[2]
        if kind in BLOCK_LINEARS or kind in TRANSFORMERS_LINEARS:
            return ".layers." in module and module not in self.skipped
        return bool(self.embeddings) and kind in OUTER_MATRICES

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the tensors of a layer (see `of_layer`), codes first.

        Args:
            shape: of its unquantized weight, ``[out, in]``.
        """
        rows, columns = shape
        groups = (rows,) if self.group_size is None else (rows, -(-columns // self.group_size))
        found = {"weight": (rows, columns * self.bits // 8), SCALE: groups}
        return found | ({ZERO: groups} if self.has_zero else {})

    @classmethod
    def of(cls, config: Any) -> QuantizedLayout | None:
        """Read the layout from a configuration made by `native_config`; None: nothing is quantized."""
        values: Any = getattr(config, LAYOUT_KEY, None)
        return None if values is None else cls.from_plain(values)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> QuantizedLayout:
        """Make the layout of its plain values, as JSON holds them.

        Raises:
            TypeError: a key is missing, or is none of a layout's.
        """
        fields: dict[str, Any] = {**values, "skipped": tuple(values.get("skipped", ()))}
        return cls(**fields)

    def put_into(self, config: Any) -> None:
        """Write the layout into a configuration, as plain values."""
        setattr(config, LAYOUT_KEY, self.plain())


def packed_signs(signs: bytes) -> str:
    """Return sampled signs, a byte each, as text of eight to a byte.

    >>> packed_signs(bytes([1, 0, 0, 0, 0, 0, 0, 0, 1]))
    '9:gIA='
    """
    eights = (signs[start : start + 8] for start in range(0, len(signs), 8))
    packed = bytes(sum(sign << (7 - place) for place, sign in enumerate(eight)) for eight in eights)
    return f"{len(signs)}:{base64.b64encode(packed).decode('ascii')}"


def unpacked_signs(text: str) -> bytes:
    r"""Return what `packed_signs` was given.

    Raises:
        CheckpointError: the text is none of its.

    >>> unpacked_signs("9:gIA=")
    b'\x01\x00\x00\x00\x00\x00\x00\x00\x01'
    """
    count, _, coded = text.partition(":")
    try:
        packed = base64.b64decode(coded, validate=True)
        signs = [byte >> (7 - place) & 1 for byte in packed for place in range(8)][: int(count)]
        fits = len(packed) == -(-int(count) // 8)
    except (ValueError, binascii.Error):
        fits, signs = False, []
    if not fits:
        raise CheckpointError(
            f"config.json: outer_signs of {LAYOUT_KEY} cannot be read (`{text[:20]}`). Restore the file that "
            "was written with the weights."
        )
    return bytes(signs)


def without_layout(config: Any) -> None:
    """Make a configuration one of floating point weights, in place."""
    vars(config).pop(LAYOUT_KEY, None)


def stored_layout(official: Mapping[str, Any], *, has_embeddings: bool) -> QuantizedLayout | None:
    """Read the layout from an official config.json.

    Args:
        official: its content.
        has_embeddings: the generation knows quantized embeddings (only the first does).

    Raises:
        CheckpointError: another bit width than 4 or 8, or our key contradicts the official ones.
    """
    bits, own = official.get("quantization_bit") or 0, official.get(LAYOUT_KEY)
    embeddings = bool(official.get("quantization_embeddings")) and bool(bits)
    if bits not in (0, *OFFICIAL_BITS):
        raise CheckpointError(
            f"config.json has quantization_bit {bits!r}, but the official formats have 4 or 8 bits (0: not "
            "quantized). Correct the file or download it again."
        )
    if embeddings and not has_embeddings:
        raise CheckpointError(
            "config.json has quantization_embeddings true, but only ChatGLM-6B was released so. Correct the "
            "file or download it again."
        )
    if own is None:
        return QuantizedLayout(bits, embeddings=embeddings, method=f"int{bits}") if bits else None
    try:
        layout = QuantizedLayout.from_plain(own)
        fits = layout.bits in OFFICIAL_BITS and (layout.group_size is None or layout.group_size > 0)
    except TypeError as error:
        raise CheckpointError(f"config.json: {LAYOUT_KEY} cannot be read ({error}).") from None
    # Edited by hand, or of another save: other tools read the official key, we ours.
    if not fits or (layout.is_official and (layout.bits, layout.embeddings) != (bits, embeddings)):
        raise CheckpointError(
            f"config.json: {LAYOUT_KEY} says {layout.bits} bits and embeddings {layout.embeddings}, but "
            f"quantization_bit is {bits} and quantization_embeddings {embeddings}. They must agree: restore "
            "the file that was written with the weights."
        )
    return layout


def official_keys(layout: QuantizedLayout | None, *, has_embeddings: bool) -> dict[str, Any]:
    """Return the keys of config.json that tell a layout.

    The official ``quantization_bit`` is written only for layouts that the released code can read: with groups
    or zero points it would take our scales for its own and answer nonsense, without an error. At the others
    transformers stops before that code runs, which would take codes of 8 bits for weights.
    """
    if layout is None:
        return {}
    keys: dict[str, Any] = {LAYOUT_KEY: layout.plain()}
    if layout.is_official:
        keys["quantization_bit"] = layout.bits
        if has_embeddings:
            keys["quantization_embeddings"] = layout.embeddings
    else:
        keys["quantization_config"] = OUR_CODES
    return keys


def without_our_mark(official: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out of an official config.json the key that stops transformers; another tool's stays."""
    if official.get("quantization_config") != OUR_CODES or official.get(LAYOUT_KEY) is None:
        return official
    return {name: value for name, value in official.items() if name != "quantization_config"}
