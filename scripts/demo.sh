#!/usr/bin/env bash
# Installs the package into a virtual environment and asks the bundled `tiny` about a photograph.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_CONSTRAINT=scripts/pins/demo.txt PIP_BUILD_CONSTRAINT=scripts/pins/demo.txt
echo "Installing the package and its requirements into .venv-demo. The first time, this takes minutes." >&2
python3 -m venv .venv-demo
.venv-demo/bin/pip install --quiet .
# From another folder, so that the installed package answers and not the checkout.
root=$PWD
cd "$(mktemp -d)"
"$root/.venv-demo/bin/mc-llava" ask "$root/examples/cup.jpg" "Which characters are on the black sign?"
