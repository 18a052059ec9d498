"""
Python processes as `subprocess` starts them, but forked from one that has imported torch and transformers already,
which spares each of them six seconds. What depends on how Python starts needs `subprocess`: which modules a command
imports, and variables that libraries read on import.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from helpers import ROOT


class Server:
    """
    The process to fork. It ends with the process that started it.

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
        """What it has said while it imported."""
        self.output.seek(0)
        return self.output.read()

    def ask(self, **request) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


class Process:
    """
    A started process. Its output is in files, which are removed once it was waited for.

    Args:
        arguments: of Python: "-m" and a module, "-c" and code, or a script, and what follows.
        input: for its standard input.
        largest: bytes of the largest file that it can write, as if a disk were full.
    """

    def __init__(self, *arguments, cwd=ROOT, env=None, input: bytes = b"", largest=None, server=None):
        self.server = server or shared_server()
        self.folder = tempfile.TemporaryDirectory()
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

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def is_running(self) -> bool:
        """Whether it runs. One that has ended is there, as a zombie, until it is waited for."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def wait(self) -> subprocess.CompletedProcess:
        """Its exit status, negative if it was killed, and its output as bytes."""
        with self.folder:
            status = self.server.ask(wait=self.pid)
            output, errors = (Path(self.folder.name, name).read_bytes() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], status, output, errors)


def run_ranks(count: int, *arguments, env=None) -> list[subprocess.CompletedProcess]:
    """Processes with the variables that torchrun gives to each, by which they find one another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    started = [Process(*arguments, env={**(os.environ if env is None else env), **group, **rank}) for rank in ranks]
    return [process.wait() for process in started]


def run(*arguments, text: bool = False, **options) -> subprocess.CompletedProcess:
    """`subprocess.run([sys.executable, *arguments], capture_output=True)`, with the options of `Process`."""
    result = Process(*arguments, **options).wait()
    if text:
        result.stdout, result.stderr = (part.decode(errors="replace") for part in (result.stdout, result.stderr))
    return result


@cache
def shared_server() -> Server:
    return Server()
