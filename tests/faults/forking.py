"""Runs many commands, each in a fork of one process that has imported the program: much faster than new processes.

A fork runs the real `run_command(main, argv)`. Only the imports happen before.
"""

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.errors import Outcome

ROOT = Path(__file__).resolve().parents[2]
SECONDS_AT_MOST = 120.0
# The modules of the commands, and modules that they import only when they need them. FOR_T5 takes seconds, so it is
# imported for its user only.
PRELOADED = ("quantization.pipeline", "quantization.export", "quantization.compare", "quantization.inspection.page",
             "recommendation.pipeline", "recommendation.recommender", "recommendation.report", "torch._dynamo",
             "sklearn.decomposition", "sklearn.feature_extraction.text")
FOR_T5 = "transformers.models.t5.modeling_t5"


class Forks:
    """A process that forks itself for every command."""

    def __init__(self):
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1",
                       "OPENBLAS_NUM_THREADS": "1"}
        self.server = subprocess.Popen([sys.executable, "-P", "-m", "tests.faults.forking"], env=environment, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, script: str, words: list[str], folder: Path, fault: dict, kill_after: float | None = None) -> Outcome:
        """Run a command in `folder`; see injection/sitecustomize.py for `fault`.

        kill_after: if the command has not ended after so many seconds, it gets SIGKILL
        """
        print(json.dumps([script, words, str(folder), fault, kill_after]), file=self.server.stdin, flush=True)
        return Outcome(*json.loads(self.server.stdout.readline()))

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


def serve() -> None:
    """Run each command that a line of the standard input names, and answer with its exit code and output."""
    for module in PRELOADED:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        script, words, *rest = json.loads(line)
        importlib.import_module(module_of(script))
        if "--export_t5" in words:
            importlib.import_module(FOR_T5)
        print(json.dumps(in_fork(script, words, *rest)), file=answers, flush=True)


def module_of(script: str) -> str:
    return script.removesuffix(".py").replace("/", ".")


def in_fork(script: str, words: list[str], folder: str, fault: dict, kill_after: float | None) -> Outcome:
    streams = [os.pipe(), os.pipe()]
    child = os.fork()
    if child == 0:
        for number, (_, write) in enumerate(streams, start=1):
            os.dup2(write, number)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115 (open until the end)
        os._exit(command(script, words, folder, fault))
    for _, write in streams:
        os.close(write)
    output = read_all([read for read, _ in streams], child, SECONDS_AT_MOST if kill_after is None else kill_after)
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *output)


def read_all(pipes: list[int], child: int, seconds: float) -> list[str]:
    """Return what the child writes to its pipes until it ends. After `seconds`, kill the child."""
    contents, end = dict.fromkeys(pipes, b""), time.monotonic() + seconds
    with selectors.DefaultSelector() as ready:
        for pipe in pipes:
            ready.register(pipe, selectors.EVENT_READ)
        while ready.get_map():
            found = ready.select(timeout=max(end - time.monotonic(), 0))
            if not found:
                os.kill(child, signal.SIGKILL)
                end = time.monotonic() + SECONDS_AT_MOST
            for key, _ in found:
                part = os.read(key.fd, 1 << 16)
                contents[key.fd] += part
                if not part:
                    ready.unregister(key.fd)
                    os.close(key.fd)
    return [content.decode(errors="replace") for content in contents.values()]


def command(script: str, words: list[str], folder: str, fault: dict) -> int:
    """Run a command in this process, as Python does, and return its exit code."""
    from common.command import run_command
    from tests.faults.injection.sitecustomize import install

    os.chdir(folder)
    module = importlib.import_module(module_of(script))
    sys.argv = [script, *words]
    install(fault)
    try:
        code = run_command(module.main)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:  # noqa: BLE001 (Python calls the hook for each of them)
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
