"""
Python processes that start at once, because they are forks of this one, which has imported everything.

A line of standard input is a request and is answered with a line:

    {"arguments": ["-m", "mc_llava", ...], "cwd": ..., "environment": {...}, "files": [stdin, stdout, stderr],
     "largest": bytes or null}   the process is started; its id
    {"poll": id}                 its exit status, negative if a signal ended it, or null if it still runs

See processes.py, which sends them.
"""

import gc
import importlib.util
import json
import os
import resource
import runpy
import signal
import sys
import types

import numpy


def serve() -> dict | None:
    """In a fork, the request to fulfill; in the server itself, None at the end of the input."""
    running = set()
    print("ready", flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            running.discard(ended)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
        elif (pid := os.fork()) == 0:
            return request
        else:
            running.add(pid)
            print(pid, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return None


def become(arguments: list[str], cwd: str, environment: dict[str, str], files: list[str], largest: int | None):
    """Do what `python ARGUMENTS` does."""
    for number, (file, mode) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
        os.dup2(os.open(file, mode), number)
    sys.stdin = open(0)  # the server's has read ahead
    if largest is not None:  # a disk that is full after so many bytes of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    numpy.random.seed()  # otherwise the same in all forks; `random` reseeds itself
    kind, *rest = arguments
    if kind in ("-m", "-c"):
        name, *sys.argv[1:] = rest
        sys.path[0] = ""
    else:
        name, sys.argv[1:] = kind, rest
        sys.path[0] = os.path.dirname(os.path.abspath(name))
    if kind == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[0] = "-c"
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(name, "<string>", "exec"), vars(main))
    else:
        sys.argv[0] = name
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor, batch, cli, convert  # noqa: F401
    from mc_llava.evaluation import running  # noqa: F401

    if importlib.util.find_spec("trl"):
        from mc_llava import training  # noqa: F401
        from mc_llava.scenes import language_model  # noqa: F401
    gc.freeze()  # or garbage collection in the forks would copy all of its memory
    if (request := serve()) is not None:
        become(**request)
