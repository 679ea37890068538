"""Codes and scales in the layout of the native kernels, the only copy: multiplied, or unpacked on demand.

The kernels compute 64 outputs at a time: four registers of 16 float32 sums (AVX-512). So the codes that they
need together lie together. A *panel* is 64 outputs; a *step* is the run of columns whose codes fill a 32-bit
word: 8 columns of INT4, 4 of INT8. In memory, panel after panel, step after step, output after output::

    panel 0                                              panel 1
      step 0: columns 0..7      step 1: columns 8..15      ...
      [out 0][out 1]..[out 63]  [out 0][out 1]..[out 63]
        |
        bit   31   28   24   20  16 | 15   12    8    4   0
        INT4  | c7 | c5 | c3 | c1 | | c6 | c4 | c2 | c0 |       even columns in the low half, odd in the high
        half INT8  |   c3   |    c1   | |    c2   |    c0   |

One load of 16 words brings a step's codes of 16 outputs, all for the same few activations, which
are then broadcast to all lanes. The halves serve the dot product of bfloat16 pairs:
``vdpbf16ps`` multiplies two neighbouring columns, so after one shift the bottom bits of both
halves are the codes of columns 2t and 2t + 1.

Codes are stored with an offset (code + 8, code + 128), unsigned, for two reasons: four bits
can then be used as an index into a table of bfloat16 numbers, and ``vpdpbusd``, the dot
product of bytes, takes one operand unsigned. AVX2 reads the same panels, eight outputs to a register
(``csrc/tiles_avx2.h``), so that nothing outside ``csrc`` knows for which of both it was compiled.

Shapes: R rows, O output features, I input features, P panels of 64 outputs, G groups.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glmtune.models.checkpoints.quantized_layout import SCALE, ZERO
from glmtune.quantization.arithmetic.primitives import round_activations
from glmtune.quantization.kernels.native import Weight, native_library

PANEL = 64
"""Outputs that are computed together; the same number in ``csrc/activations.h``."""
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of types in the C++ functions, their ``enum Type``."""
ACTIVATION_BLOCK = 256
"""Columns of activations that share a scale where the weight has no groups; ``BLOCK`` in
``csrc``. One scale per row would let a single large activation, as models of this size have
them, push all others to a few codes."""
MATRIX_WEIGHTS = 2**22
"""Weights that are in floating point at once where the weight is formed: 16 MiB in float32. Less would make
the products of matrices too narrow, more would leave the cache."""
MATRIX_ROWS = 64
"""Rows from which forming the weight can be faster than the kernels: its cost is
then spread over enough rows."""


class PackedCodes:
    """A weight packed for the native kernels.

    Attributes:
        shape: O, I, columns of a group (0: the row) and bits.
    """

    def __init__(
        self, words: Tensor, scale_PG64: Tensor, zero_PG64: Tensor | None, shape: tuple[int, int, int, int]
    ) -> None:
        """Take tensors that are packed already.

        Args:
            words: int32, see ``csrc/packed_product.cpp``.
            scale_PG64: float16.
            zero_PG64: float16, or None.
            shape: see the class.
        """
        self._words, self._scale, self._zero, self.shape = words, scale_PG64, zero_PG64, shape
        # The address is made once, as a decoding step calls hundreds of layers.
        # Attributes keep tensors and struct alive.
        zero = None if zero_PG64 is None else zero_PG64.data_ptr()
        self._weight = Weight(words.data_ptr(), scale_PG64.data_ptr(), zero, *shape)
        self._address = ctypes.addressof(self._weight)
        self._functions = native_library().functions

    @property
    def outputs(self) -> int:
        """O."""
        return self.shape[0]

    @classmethod
    def of(
        cls, packed: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int | None
    ) -> PackedCodes:
        """Pack codes.

        Args:
            packed: int8, as `glmtune.quantization.arithmetic.packing.pack` makes it.
            scale: float16 ``[O]`` or ``[O, G]``.
            zero: float16 ``[O, G]``, or None.
            bits: 4 or 8.
            group_size: columns that share a scale; None: the row.
        """
        shape = (len(packed), packed.shape[1] * 8 // bits, group_size or 0, bits)
        probe = Weight(None, None, None, *shape)  # the C++ side alone computes how much room a shape needs
        words = _allocated(native_library().functions.glmtune_words(ctypes.addressof(probe)))
        made = cls(words, _panels(scale), None if zero is None else _panels(zero), shape)
        source = packed.detach().contiguous()
        made._functions.glmtune_pack(made._address, source.data_ptr(), torch.get_num_threads())
        return made

    @classmethod
    def concatenated(cls, parts: Sequence[PackedCodes]) -> tuple[PackedCodes, list[PackedCodes]]:
        """Concatenate weights with the same input along their outputs.

        Args:
            parts: alike but for their outputs, each a multiple of 64: whole panels can be copied as they are.

        Returns:
            The whole, and the parts as views of it.
        """
        words = _allocated(sum(len(part._words) for part in parts))
        torch.cat([part._words for part in parts], out=words)
        scale = torch.cat([part._scale for part in parts])
        zeros = [part._zero for part in parts if part._zero is not None]
        zero = torch.cat(zeros) if zeros else None
        shape = (sum(part.outputs for part in parts), *parts[0].shape[1:])
        views, place, panel = [], 0, 0
        for part in parts:
            size, panels = len(part._words), len(part._scale)
            its_zero = None if zero is None else zero[panel : panel + panels]
            its_scale = scale[panel : panel + panels]
            views.append(cls(words[place : place + size], its_scale, its_zero, part.shape))
            place, panel = place + size, panel + panels
        return cls(words, scale, zero, shape), views

    def multiply(self, x_RI: Tensor, *, rounded: bool, gated: bool = False) -> Tensor:
        """Return ``x @ weight.T``, ``[R, O]`` in the type of x; sums are formed in float32.

        Args:
            x_RI: float32, bfloat16 or float16.
            rounded: activations in INT8, see `glmtune.quantization.arithmetic.primitives.round_activations`.
            gated: return ``silu(first half) * second half`` of that instead, ``[R, O / 2]``, rounded once;
                the halves are multiples of 64.
        """
        x_RI = x_RI.contiguous()
        out = torch.empty((len(x_RI), self.outputs // 2 if gated else self.outputs), dtype=x_RI.dtype)
        given = (self._address, x_RI.data_ptr(), len(x_RI), DTYPE_NUMBERS[x_RI.dtype], out.data_ptr())
        self._functions.glmtune_product(*given, rounded, gated, torch.get_num_threads())
        return out

    def weight(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return the weight of some outputs: a transposed view (see `layers.linear.Product`)."""
        first, count = start // PANEL, -(-(stop - start) // PANEL)
        # Transposed, as a panel has its outputs side by side: 16 of them are written with one store.
        weight_IO = torch.empty((self.shape[1], count * PANEL), dtype=dtype)
        target, threads = weight_IO.data_ptr(), torch.get_num_threads()
        self._functions.glmtune_dequantize(self._address, first, count, DTYPE_NUMBERS[dtype], target, threads)
        return weight_IO[:, : stop - start].T

    @property
    def names(self) -> tuple[str, ...]:
        """See `glmtune.quantization.layers.linear.PackedStorage`."""
        return ("weight", SCALE) if self._zero is None else ("weight", SCALE, ZERO)

    def tensor(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `glmtune.quantization.layers.linear.PackedStorage`; ``start`` begins a panel."""
        stop = self.outputs if stop is None else min(stop, self.outputs)
        panels = slice(start // PANEL, -(-stop // PANEL))
        if name == "weight":
            return self._codes(panels, stop - start)
        values_PG64 = self._scale if name == SCALE or self._zero is None else self._zero
        values_OG = values_PG64[panels].transpose(1, 2).flatten(0, 1)[: stop - start]
        return values_OG.contiguous() if self.shape[2] else values_OG[:, 0].contiguous()

    def _codes(self, panels: slice, outputs: int) -> Tensor:
        _, inputs, group, bits = self.shape
        words = self._words.unflatten(0, (len(self._scale), -1))[panels]
        weight = Weight(words.data_ptr(), None, None, outputs, inputs, group, bits)
        packed = torch.empty((outputs, inputs * bits // 8), dtype=torch.int8)
        address = ctypes.addressof(weight)
        self._functions.glmtune_unpack(address, packed.data_ptr(), torch.get_num_threads())
        return packed


@dataclass(frozen=True, slots=True)
class PackedProduct:
    """The product with a packed weight.

    Attributes:
        packed: the weight.
        rounded: see `PackedCodes.multiply`.
    """

    packed: PackedCodes
    rounded: bool

    def __call__(self, x_RI: Tensor) -> Tensor:
        """Return ``x @ weight.T``, ``[R, O]``."""
        if self.prefers_matrices(x_RI):
            return self.by_matrices(x_RI)
        return self.packed.multiply(x_RI, rounded=self.rounded)

    def prefers_matrices(self, x_RI: Tensor) -> bool:
        """Say whether to form the weight and multiply by that: faster for these inputs than the kernels."""
        if len(x_RI) < MATRIX_ROWS:
            return False
        if x_RI.dtype == torch.bfloat16:
            return native_library().matrix_unit  # AMX, which PyTorch uses and our kernels do not
        # The kernels split a float32 row into three bfloat16 rows (exact products), three times the work.
        return x_RI.dtype == torch.float32 and not self.rounded

    def by_matrices(self, x_RI: Tensor) -> Tensor:
        """Return ``x @ weight.T`` by PyTorch's products, the weight formed a part at a time."""
        if self.rounded:
            x_RI = round_activations(x_RI, block=self.packed.shape[2] or ACTIVATION_BLOCK)
        outputs, inputs = self.packed.shape[:2]
        step = max(1, MATRIX_WEIGHTS // (inputs * PANEL)) * PANEL
        out_RO = x_RI.new_empty(len(x_RI), outputs)
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            out_RO[:, start:stop] = x_RI @ self.packed.weight(start, stop, x_RI.dtype).T
        return out_RO

    def gated(self, x_RI: Tensor) -> Tensor:
        """Return ``silu(first half) * second half`` of the outputs, ``[R, O / 2]``."""
        return self.packed.multiply(x_RI, rounded=self.rounded, gated=True)

    def can_be_fused_with(self, other: PackedProduct) -> bool:
        """Say whether both can be computed as one product."""
        alike = self.packed.shape[1:] == other.packed.shape[1:] and self.rounded == other.rounded
        return alike and not self.packed.outputs % PANEL and not other.packed.outputs % PANEL


def _allocated(count: int) -> Tensor:
    """Return room for int32 numbers: pages of their own, huge ones where the system has them.

    Pages of their own, because packing allocates a layer's words while its old codes are freed:
    in the heap that leaves holes too small for the next layer, and the peak grows by them. Huge
    ones, because decoding reads every weight from end to end for each token; with pages of 4 KiB
    that misses the TLB at each of them.
    """
    pages = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room = torch.frombuffer(pages, dtype=torch.int32)
    native_library().functions.glmtune_use_huge_pages(room.data_ptr(), room.nbytes)
    return room


def _panels(values: Tensor) -> Tensor:
    """Lay scales or zero points ``[O]`` or ``[O, G]`` out as ``[P, G, 64]``, zeros behind the last output."""
    values_OG = values.detach().reshape(len(values), -1)
    padded = torch.nn.functional.pad(values_OG, (0, 0, 0, -len(values_OG) % PANEL))
    return padded.reshape(-1, PANEL, padded.shape[1]).transpose(1, 2).contiguous()
