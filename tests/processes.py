"""
Python processes as `subprocess` starts them, but forked from one that has imported torch and transformers already,
which saves six seconds per process. What depends on how Python starts needs `subprocess`: which modules a command
imports, variables that libraries read on import, and hashes of strings, which have one seed in all forks.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from helpers import ROOT


TIMEOUT = 1200  # seconds


class Server:
    """
    The process to fork. It ends with the process that started it, and so do its forks.

    Args:
        environment: variables to import with, in addition to those of this process.
    """

    def __init__(self, **environment: str):
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "process_server.py"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.output,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n", self.errors()

    def errors(self) -> str:
        """What it printed while it was importing."""
        self.output.seek(0)
        return self.output.read()

    def ask(self, **request) -> int | None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Process:
    """
    A started process. Its output is in files, which are removed after `wait`.

    Args:
        arguments: of Python: "-m" and a module, "-c" and code, or a script, and what follows.
        input: for its standard input.
        largest: bytes of the largest file that it can write, as if a disk were full.
    """

    def __init__(self, *arguments, cwd=ROOT, env=None, input: bytes = b"", largest=None, server=None):
        self.server = server or shared_server()
        self.folder, self.status = tempfile.TemporaryDirectory(), None
        files = [Path(self.folder.name, name) for name in ("stdin", "stdout", "stderr")]
        for file in files:
            file.write_bytes(input if file.name == "stdin" else b"")
        self.pid = self.server.ask(
            arguments=list(map(str, arguments)),
            cwd=str(cwd),
            environment=dict(os.environ if env is None else env),
            files=list(map(str, files)),
            largest=largest,
        )

    def poll(self) -> int | None:
        """Its exit status, negative if a signal ended it; None if it still runs."""
        if self.status is None:
            self.status = self.server.ask(poll=self.pid)
        return self.status

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = TIMEOUT) -> subprocess.CompletedProcess:
        """Its exit status and its output as bytes. It is killed after so many seconds."""
        deadline = time.monotonic() + timeout
        with self.folder:
            try:
                while self.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.01)
            finally:  # or when the test is interrupted
                self.kill()
            while self.poll() is None:
                time.sleep(0.01)
            output, errors = (Path(self.folder.name, name).read_bytes() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], self.status, output, errors)


def run_ranks(count: int, *arguments, env=None) -> list[subprocess.CompletedProcess]:
    """
    Processes with the variables that torchrun gives to each, by which they find one another. Once one has ended, the
    others have a minute: if it failed, they would wait for it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    started = [Process(*arguments, env={**(os.environ if env is None else env), **group, **rank}) for rank in ranks]
    deadline = time.monotonic() + TIMEOUT
    while all(process.poll() is None for process in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [process.wait(60) for process in started]


def run(*arguments, text: bool = False, **options) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, *arguments], capture_output=True)`, with the options of `Process`."""
    result = Process(*arguments, **options).wait()
    if text:
        result.stdout, result.stderr = (part.decode(errors="replace") for part in (result.stdout, result.stderr))
    return result


@cache
def shared_server() -> Server:
    return Server()
