"""
Runs `mc-llava` commands in forks of a process that has imported everything: see test_kills.py.

It says that it is ready. A line of standard input then is {"words": ..., "limit": bytes of the largest file or null,
"stderr": path}, and is answered by the process to kill. An empty line is answered by its exit status, negative if it
was killed.
"""

import json
import os
import resource
import sys

from mc_llava import MCLlavaForConditionalGeneration, MCLlavaProcessor, batch, cli, convert, training  # noqa: F401
from mc_llava.evaluation import running  # noqa: F401
from mc_llava.scenes import language_model  # noqa: F401


def run(words: list[str], limit: int | None, stderr: str) -> int:
    output = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if limit is not None:  # a disk that is full after so many bytes of a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["mc-llava", *words]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


print("ready", flush=True)
while line := sys.stdin.readline():
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = run(**json.loads(line))
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()  # until then the process is there, if only as a zombie
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
