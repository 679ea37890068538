"""The products of ``csrc/``: compiled once into the user's cache, called through ctypes.

Compiled on the user's machine, as the fast instructions differ by processor (AVX-512 BF16, VNNI): with
``-march=native`` the compiler takes what is there, which one wheel for all could not. Plain C functions and
ctypes rather than an extension of PyTorch, whose headers take a minute to compile, want a compiler that fits
PyTorch's, and tie the result to its version; without them it is a matter of seconds.

What must hold, in the order in which it is checked; the first that does not is the reason given in the log::

    GLMTUNE_NATIVE_KERNELS is not 0 -> Linux on x86-64, AVX-512 -> a C++ compiler -> it compiles -> loads

Otherwise products of PyTorch or the plain path run instead
(`glmtune.quantization.kernels.dispatch`). Nothing is compiled on import. ``GLMTUNE_CACHE`` moves the
cache (default ``~/.cache/glmtune``; ``library_cache.py``), ``CXX`` names the compiler.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmtune.quantization.kernels.library_cache import cached_library

LOGGER = logging.getLogger(__name__)

SWITCH = "GLMTUNE_NATIVE_KERNELS"
SOURCES = Path(__file__).parent / "csrc"
# -march=native: whatever this processor has. -w: warnings of a compiler we never saw
# would only confuse a user.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-w")
COMPILERS = ("g++", "c++", "clang++")
REQUIRED_ISA = frozenset({"avx512f", "avx512bw", "avx512vl", "f16c"})
"""Instruction sets without which the sources do not compile: 512-bit vectors, of 16-bit numbers, masked
256-bit loads of those, and float16. BF16 and VNNI are used where the compiler defines them."""
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
    if os.environ.get(SWITCH, "1") == "0":
        return NativeLibrary(None, f"{SWITCH} is 0")
    if sys.platform != "linux" or not hasattr(os, "geteuid"):
        # Elsewhere no file describes the processor, and on Windows none says whose a file in the cache is.
        return NativeLibrary(None, f"they are compiled on Linux only, and this is {platform.system()}")
    flags = _cpu_flags()
    if platform.machine() != "x86_64" or not flags >= REQUIRED_ISA:
        return NativeLibrary(None, "the processor has no AVX-512")
    compiler = _compiler()
    if compiler is None:
        return _refused(f"no C++ compiler found ({', '.join(COMPILERS)}, or CXX)")
    try:
        functions: Any = _load_library(compiler, flags)
    except OSError as error:
        return _refused(f"they cannot be kept or loaded: {error}")
    except subprocess.SubprocessError as error:
        said = str(getattr(error, "stderr", None) or error).strip() or repr(error)
        return _refused(f"compiling them failed: {said.splitlines()[-1]}")
    return _described(functions, matrix_unit="amx_bf16" in flags)


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


def _load_library(compiler: str, cpu_flags: frozenset[str]) -> ctypes.CDLL:
    """Load the library, compiled if there is no whole one of this kind.

    The digest covers all that decides what is in it: sources, compiler, flags and the processor's features.
    Different machines may share a home folder, and a library compiled for another processor would die of an
    illegal instruction. PyTorch's version is in it for caution, as both run in one OpenMP runtime.
    """
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(SOURCES.iterdir())))
    for part in (torch.__version__, compiler, *FLAGS, *sorted(cpu_flags)):
        digest.update(part.encode())
    sources = sorted(SOURCES.glob("*.cpp"))
    return ctypes.CDLL(str(cached_library([compiler, *FLAGS], sources, digest.digest())))


def _compiler() -> str | None:
    given = os.environ.get("CXX")
    return shutil.which(given) if given else next(filter(None, map(shutil.which, COMPILERS)), None)


def _cpu_flags() -> frozenset[str]:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
