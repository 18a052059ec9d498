#!/usr/bin/env bash
# Installs the package into a virtual environment of its own and asks `tiny`, which comes along, about a drawn scene.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv-demo
.venv-demo/bin/pip install --quiet --constraint constraints.txt .
# From elsewhere: what answers is what was installed.
root=$PWD
cd "$(mktemp -d)"
"$root/.venv-demo/bin/mc-llava" ask "$root/examples/scene1.jpg" "What is written on the blue sign?"
