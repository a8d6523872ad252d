"""Run a command in two processes, with torchrun or without it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

def environment(**added: str) -> dict[str, str]:
    keys = ("WORLD_SIZE", "RANK", "PYTHONPATH")
    return {**{k: v for k, v in os.environ.items() if k not in keys}, "OMP_NUM_THREADS": "1", **added}


def in_two_processes(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Run a script and its flags with torchrun in this folder."""
    return subprocess.run([*TORCHRUN, *words], cwd=folder, capture_output=True, text=True, timeout=300, check=False,
                          env=environment())


def by_hand(words: list[str], folder: Path, **added: str) -> list[tuple[int, str]]:
    """Run it without torchrun, which may end a process before it reports; each process's exit code and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Files, not pipes: a process that waits until its pipe is read would block the other one.
    processes = []
    for rank in "01":
        job = {"TORCHELASTIC_RUN_ID": "by hand", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2",
               "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        with open(folder / f"stderr-{rank}", "w", encoding="utf-8") as file:
            processes.append(subprocess.Popen([sys.executable, *words], cwd=folder, stdout=subprocess.DEVNULL,
                                              stderr=file, env=environment(**job, **added)))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, (folder / f"stderr-{rank}").read_text(encoding="utf-8")) for rank, code in enumerate(codes)]
