#!/usr/bin/env bash
# Measures the engine on this machine's GPU within ten minutes, unattended: loadtest/engine/gpu.sh [OPTIONS of gpu.py].
# Needs a Python with torch, triton, numpy, safetensors, tokenizers and jinja2 (PYTHON, else python3); Hitpath need not
# be installed. Results are written as they come to $OUT, else to gpu-results.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m loadtest.engine.gpu --out "${OUT:-gpu-results}" "$@"
