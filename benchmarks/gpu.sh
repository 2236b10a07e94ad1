#!/usr/bin/env bash
# One command on a machine with a CUDA device, under 10 minutes, no network: the tests marked `gpu`, then a table of
# samples/s, MFU and peak memory for ViT-S, -B and -L, every attention backend, compile, recompute and FSDP2.
#
#     benchmarks/gpu.sh                          writes gpu_table.md
#     benchmarks/gpu.sh --out table.md
#     benchmarks/gpu.sh --device cpu --quick     a test of the script itself: a tiny network on the CPU
#
# PYTHON names the interpreter (.venv/bin/python where there is one). The exit status is that of the tests.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

device=cuda
previous=
for argument in "$@"; do
    [ "$previous" = --device ] && device=$argument
    [ "$argument" = --device=cpu ] && device=cpu
    previous=$argument
done

if [ "$device" = cuda ]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device: torch.cuda.is_available() is false; --device cpu --quick tests this script without one")' || exit 1
    timeout 120 "$PYTHON" -m pytest -m gpu -rs -q
    tests=$?
else
    "$PYTHON" -m pytest -m gpu --collect-only -q tests/test_attention.py tests/test_cross_entropy.py tests/test_waiting.py
    tests=$?
fi
"$PYTHON" benchmarks/gpu_table.py "$@" || exit 1
exit "$tests"
