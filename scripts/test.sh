#!/usr/bin/env bash
# Makes a virtual environment of its own and runs the tests in it. Requirements may follow: transformers==5.19.0
set -euo pipefail
cd "$(dirname "$0")/.."
environment="${TEST_ENVIRONMENT:-.venv-test}"
python3 -m venv --clear "$environment"
"$environment/bin/pip" install --quiet --constraint constraints.txt --editable ".[test]" "$@"
# lmms-eval, to compare with. All that it asks for is gigabytes, of which running it needs little.
"$environment/bin/pip" install --quiet --constraint constraints.txt --requirement tests/lmms_eval.txt
"$environment/bin/pip" install --quiet --no-deps lmms-eval==0.7.3
"$environment/bin/pip" list | grep -E "^(torch|transformers|pillow|numpy) "
# Two files at a time, of one thread each: most tests wait for a process or for Python.
OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest --numprocesses 2 --dist loadfile
# Gradio wants an older Pillow, whose resizing differs from that of the published code's recorded outputs: it comes last.
"$environment/bin/pip" install --quiet --constraint constraints.txt --editable ".[test,end-to-end]" "$@"
"$environment/bin/python" -m pytest tests/test_app.py tests/test_serve.py tests/test_notebooks.py
