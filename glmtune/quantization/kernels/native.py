"""The products of ``csrc/``: compiled once into the user's cache, called through ctypes.

Compiled on the user's machine, as the fast instructions differ by processor (AVX2, AVX-VNNI, AVX-512 BF16 and
VNNI): with ``-march=native`` the compiler takes what is there, which one wheel for all could not. Plain C
functions and ctypes rather than an extension of PyTorch, whose headers take a minute to compile, want a
compiler that fits PyTorch's, and tie the result to its version; without them it is a matter of seconds.

What must hold, in the order in which it is checked; the first that does not is the reason given in the log::

    GLMTUNE_NATIVE_KERNELS is not 0 -> Linux on x86-64 -> AVX-512 or AVX2 -> a C++ compiler -> it compiles
    -> loads

Otherwise products of PyTorch or the plain path run instead
(`glmtune.quantization.kernels.dispatch`). Nothing is compiled on import. ``GLMTUNE_CACHE`` moves the
cache (default ``~/.cache/glmtune``; ``library_cache.py``), ``CXX`` names the compiler. To see here what runs
on processors that have less, ``GLMTUNE_NATIVE_KERNELS`` can be one of `LESSER`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmtune.quantization.kernels.library_cache import cached_library

LOGGER = logging.getLogger(__name__)

SWITCH = "GLMTUNE_NATIVE_KERNELS"
SOURCES = Path(__file__).parent / "csrc"
# -w: warnings of a compiler we never saw would only confuse a user.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-w")
COMPILERS = ("g++", "c++", "clang++")


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """What the sources are compiled for.

    Attributes:
        needs: names in ``/proc/cpuinfo`` of what the sources do not compile or run without.
        flags: of the compiler; by themselves, whatever this processor has.
    """

    needs: frozenset[str]
    flags: tuple[str, ...] = ("-march=native",)


AVX512 = InstructionSet(frozenset({"avx512f", "avx512bw", "avx512vl", "f16c"}))
"""512-bit vectors, of 16-bit numbers, masked 256-bit loads of those, and float16. BF16 and VNNI are used
where the compiler defines them."""
AVX2 = InstructionSet(frozenset({"avx2", "fma", "f16c"}))
"""256-bit vectors, multiplication with addition, and float16. AVX-VNNI is used where the compiler has it."""
LESSER = {
    "avx2": InstructionSet(AVX2.needs, ("-mavx2", "-mfma", "-mf16c")),
    "avx2-vnni": InstructionSet(AVX2.needs | {"avx_vnni"}, ("-mavx2", "-mfma", "-mf16c", "-mavxvnni")),
}
"""Value of ``GLMTUNE_NATIVE_KERNELS`` → what processors without AVX-512 have, the second from Intel's 12th
generation on. For tests and measurements."""
CPU_INFO = Path("/proc/cpuinfo")


class Weight(ctypes.Structure):
    """A packed weight, field by field as ``struct Weight`` in ``csrc/activations.h``."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """The compiled source, or why there is none.

    Attributes:
        functions: the loaded library; None without one.
        refusal: why there is none; "" if there is.
        rounds_activations: it has the product with activations in INT8.
        matrix_unit: PyTorch multiplies matrices in bfloat16 by a unit of the processor's own (AMX).
    """

    functions: Any
    refusal: str = ""
    rounds_activations: bool = False
    matrix_unit: bool = False


@functools.cache
def native_library() -> NativeLibrary:
    """Return the library: compiled at the first call on a machine (seconds), loaded once per process.

    Never raises: what is missing is said in ``refusal``, and once in the log if it was worth a try.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch == "0":
        return NativeLibrary(None, f"{SWITCH} is 0")
    if switch not in ("1", *LESSER):
        return _refused(f"{SWITCH} is {switch!r}, not 1, 0, {' or '.join(LESSER)}")
    if sys.platform != "linux" or not hasattr(os, "geteuid"):
        # Elsewhere no file describes the processor, and on Windows none says whose a file in the cache is.
        return NativeLibrary(None, f"they are compiled on Linux only, and this is {platform.system()}")
    flags = _cpu_flags()
    candidates = (LESSER[switch],) if switch in LESSER else (AVX512, AVX2)
    chosen = next((each for each in candidates if flags >= each.needs), None)
    if platform.machine() != "x86_64" or chosen is None:
        wanted = "neither AVX-512 nor AVX2" if switch == "1" else f"not what {SWITCH}={switch} names"
        return NativeLibrary(None, f"the processor has {wanted}")
    compiler = _compiler()
    if compiler is None:
        return _refused(f"no C++ compiler found ({', '.join(COMPILERS)}, or CXX)")
    try:
        functions: Any = _load_library([compiler, *FLAGS, *chosen.flags], flags)
    except OSError as error:
        return _refused(f"they cannot be kept or loaded: {error}")
    except subprocess.SubprocessError as error:
        said = str(getattr(error, "stderr", None) or error).strip() or repr(error)
        return _refused(f"compiling them failed: {said.splitlines()[-1]}")
    return _described(functions, matrix_unit=chosen is AVX512 and "amx_bf16" in flags)


def _refused(reason: str) -> NativeLibrary:
    """Say once what keeps this processor from its fast products: it could have them."""
    LOGGER.warning("PyTorch's products of quantized weights run in place of faster ones: %s", reason)
    return NativeLibrary(None, reason)


def _described(functions: Any, *, matrix_unit: bool) -> NativeLibrary:
    """Tell ctypes the types of the functions, and say what the library can do."""
    # Without these, ctypes would pass addresses as 32-bit integers.
    functions.glmtune_words.restype = ctypes.c_int64
    functions.glmtune_words.argtypes = [ctypes.c_void_p]
    functions.glmtune_use_huge_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    for name in ("glmtune_pack", "glmtune_unpack"):
        getattr(functions, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    pointer, number = ctypes.c_void_p, ctypes.c_int
    functions.glmtune_bfloat16_product.argtypes = [
        *(pointer, pointer, ctypes.c_int64, ctypes.c_int64),
        *(pointer, ctypes.c_int64, pointer, number),
    ]
    functions.glmtune_product.argtypes = [
        *(pointer, pointer, ctypes.c_int64, number),
        *(pointer, number, number, number),
    ]
    functions.glmtune_dequantize.argtypes = [
        *(pointer, ctypes.c_int64, ctypes.c_int64),
        *(number, pointer, number),
    ]
    long = ctypes.c_int64
    functions.glmtune_rms_norm.argtypes = [
        *(pointer, pointer, long, long, ctypes.c_float),
        *(number, pointer, number),
    ]
    functions.glmtune_rotate.argtypes = [
        *(pointer, pointer, pointer, pointer),
        *(long, long, long),
        *(number, pointer, number),
    ]
    rounds = bool(functions.glmtune_products() & 2)
    return NativeLibrary(functions, rounds_activations=rounds, matrix_unit=matrix_unit)


def _load_library(command: Sequence[str], cpu_flags: frozenset[str]) -> ctypes.CDLL:
    """Load the library, compiled if there is no whole one of this kind.

    The digest covers all that decides what is in it: sources, compiler, flags and the processor's features.
    Different machines may share a home folder, and a library compiled for another processor would die of an
    illegal instruction. PyTorch's version is in it for caution, as both run in one OpenMP runtime.
    """
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(SOURCES.iterdir())))
    for part in (torch.__version__, *command, *sorted(cpu_flags)):
        digest.update(part.encode())
    sources = sorted(SOURCES.glob("*.cpp"))
    return ctypes.CDLL(str(cached_library(command, sources, digest.digest())))


def _compiler() -> str | None:
    given = os.environ.get("CXX")
    return shutil.which(given) if given else next(filter(None, map(shutil.which, COMPILERS)), None)


def _cpu_flags() -> frozenset[str]:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
