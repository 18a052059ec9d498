"""Forks behave like processes that `subprocess` starts, and none is left over."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from processes import Process, run, run_ranks


pytestmark = pytest.mark.slow
CODE = """
import os, sys
print(sys.argv, sys.stdin.read(), os.getcwd(), os.environ["COLOR"], sys.path[0] in ("", sys.argv[1]))
raise SystemExit(sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["-c", "script"])
def test_a_fork_does_what_a_process_does(tmp_path, kind):
    (tmp_path / "code.py").write_text(CODE)
    arguments = ["-c", CODE] if kind == "-c" else [str(tmp_path / "code.py")]
    options = {"cwd": tmp_path, "env": {**os.environ, "COLOR": "red"}, "input": b"Why?"}
    arguments += [str(tmp_path), "it failed"]
    found = run(*arguments, **options)
    expected = subprocess.run([sys.executable, *arguments], capture_output=True, **options)
    assert (found.returncode, found.stdout, found.stderr) == (1, expected.stdout, b"it failed\n")
    assert (expected.returncode, expected.stderr) == (1, b"it failed\n")
    assert b"Why?" in found.stdout and b"red True" in found.stdout


def test_one_that_runs_too_long_is_killed():
    process = Process("-c", "import time; print('started', flush=True); time.sleep(600)")
    folder = Path(process.folder.name)
    while not (folder / "stdout").read_bytes():
        assert process.poll() is None
        time.sleep(0.01)
    result = process.wait(0)
    assert (result.returncode, result.stdout) == (-9, b"started\n")
    assert not folder.exists()


def test_forks_draw_their_own_random_numbers():
    code = "import numpy, random; print(numpy.random.rand(), random.random())"
    (first, second), (third, fourth) = (run("-c", code).stdout.split() for _ in range(2))
    assert first != third and second != fourth


def test_ranks_do_not_wait_for_one_that_failed(monkeypatch):
    code = "import os, time; time.sleep(600 * (os.environ['RANK'] == '0')); raise SystemExit(3)"
    wait = Process.wait
    monkeypatch.setattr(Process, "wait", lambda process, timeout: wait(process, timeout / 60))
    assert [result.returncode for result in run_ranks(2, "-c", code)] == [-9, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are listed in /proc")
def test_none_outlives_a_test_run_that_was_killed():
    code = """
import os, signal
from processes import Process
process = Process("-c", "import time; time.sleep(600)")
print(process.server.process.pid, process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    deadline = time.monotonic() + 60
    while any(is_running(int(pid)) for pid in result.stdout.split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """False for a zombie, which some containers keep."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
