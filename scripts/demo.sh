#!/usr/bin/env bash
# Installs the package into a virtual environment of its own and asks about a photograph.
#
# The published weights are 6.4 GB on the Hub, so the demo makes a small random checkpoint in the published layout: what
# you see works is everything but the answer, which is gibberish.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv-demo
.venv-demo/bin/pip install --quiet --constraint constraints.txt .
rm -rf .venv-demo/checkpoint
.venv-demo/bin/python scripts/make_published_checkpoint.py .venv-demo/checkpoint
.venv-demo/bin/mc-llava ask examples/coffee.jpg "What is on the table?" --model .venv-demo/checkpoint --max-new-tokens 20
