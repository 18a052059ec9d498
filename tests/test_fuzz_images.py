"""Ten thousand damaged pictures and strange arrays; scripts/fuzz.sh runs more."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT


pytestmark = [pytest.mark.slow, pytest.mark.fuzz]
SEED, COUNT = int(os.environ.get("FUZZ_SEED", 0)), int(os.environ.get("FUZZ_COUNT", 10_000))


def test_damaged_pictures_give_a_picture_or_a_value_error_in_little_time_and_memory():
    command = [sys.executable, "tests/fuzz_worker.py", str(SEED), str(COUNT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT, env=environment)
    told = f"seed {SEED}, exit code {run.returncode}\n{run.stdout}\n{run.stderr[-5000:]}"
    assert run.returncode == 0, told
    summary = json.loads(run.stdout)
    assert summary["inputs"] == COUNT and summary["pictures"] > COUNT / 10, told
