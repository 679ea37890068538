#!/usr/bin/env bash
# What products of INT4 and INT8 codes, PyTorch's and ours, give on processors that are not here: numbers, not speed.
#   bash scripts/emulated_numbers.sh avx2          an x86-64 processor with AVX2 and without AVX-512
#   bash scripts/emulated_numbers.sh arm ROOT      64-bit ARM, from a folder of Debian's packages, made if it is absent
# Needs Debian's qemu-user-static; `arm` also apt sources for arm64 (`dpkg --add-architecture arm64`, `apt-get update`)
# and about 1.5 GB. Variables:
#   CPU=Haswell        what is emulated; for arm such as cortex-a72 (NEON), neoverse-v1 (SVE, i8mm, bfloat16), max
#   TORCH=torch==...   for arm; by default the last whose build for ARM on the package index is one for CPUs
set -euo pipefail
cd "$(dirname "$0")/.."

REPO=$PWD
TORCH=${TORCH:-torch==2.8.0}
PYTHON=${PYTHON:-python3}

avx2() {
    PYTHONPATH=$REPO OMP_NUM_THREADS=1 qemu-x86_64-static -cpu "${CPU:-Haswell}" \
        "$("$PYTHON" -c 'import sys; print(sys.executable)')" scripts/emulated_numbers.py
}

# The packages are only unpacked: nothing of them is installed or run outside the emulator.
make_root() {
    local root=$1 packages
    mkdir -p "$root/archives" "$root/site"
    packages=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances python3.11:arm64 libstdc++6:arm64 libgomp1:arm64 | sed -n 's/^\(\w.*:arm64\)$/\1/p' | sort -u)
    # Words: each is the name of a package.
    # shellcheck disable=SC2086
    (cd "$root/archives" && apt-get download -qq $packages)
    for archive in "$root"/archives/*.deb; do
        dpkg -x "$archive" "$root"
    done
    "$PYTHON" -m pip install --quiet --target "$root/site" --only-binary=:all: --python-version 3.11 \
        --implementation cp --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 \
        --platform manylinux2014_aarch64 'transformers>=5.24,<6' numpy safetensors regex pyyaml psutil xxhash pydantic \
        sympy networkx jinja2 fsspec filelock typing-extensions
    "$PYTHON" -m pip install --quiet --target "$root/site" --only-binary=:all: --python-version 3.11 --no-deps \
        --implementation cp --platform manylinux_2_28_aarch64 "$TORCH"
}

arm() {
    local root
    root=$(realpath -m "${1:?name a folder for the ARM system: bash scripts/emulated_numbers.sh arm ROOT}")
    [ -d "$root/site/torch" ] || make_root "$root"
    PYTHONPATH=$root/site:$REPO PYTHONHOME=$root/usr OMP_NUM_THREADS=1 \
        qemu-aarch64-static -L "$root" -cpu "${CPU:-max}" "$root/usr/bin/python3.11" scripts/emulated_numbers.py
}

case ${1:-} in
    avx2) avx2 ;;
    arm) arm "${2:-}" ;;
    *)
        echo "Say which: bash scripts/emulated_numbers.sh avx2, or arm ROOT." >&2
        exit 2
        ;;
esac
