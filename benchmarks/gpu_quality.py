"""A training command whose validation metrics are watched from outside, with the seconds since its start."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_results import REACHED_NDCG

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "recommendation/models/encoder_decoder/recipes/letter.yaml"


class Training(NamedTuple):
    """A training command whose validation metrics are watched."""

    dataset: str
    flags: tuple[str, ...]
    seconds: float             # then it is stopped
    seconds_of_precision: float
    wanted: float              # validation ndcg@10


BEAUTY = Training("Beauty", ("--quantizer_name=imported", "--config", RECIPE, "--train_on=every_position"), 185, 60,
                  REACHED_NDCG)
TEA_SHOP = Training("tea_shop", ("--quantizer_name=random", "--d_model=16", "--max_steps=40", "--epochs=4",
                                 "--device=cpu"), 60, 10, 0.01)


def watch(training: Training, limit: float, flags: tuple[str, ...], data_root: Path, scratch: Path,
          environment: dict[str, str]) -> dict:
    """Run the training for at most `limit` seconds. Return its metrics, and the seconds until it reached its goal.

    The seconds count from the start of the process. There are test metrics only if the training has ended by itself.
    Raises RuntimeError if the training fails.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    words = ["recommendation/main.py", "--model=encoder_decoder", f"--category={training.dataset}", *training.flags,
             *flags]
    command = [sys.executable, *words, f"--data_root={data_root}", f"--run_root={folder / 'runs'}",
               f"--run_list={folder / 'list'}"]
    begun, curve, num_lines, running = time.monotonic(), list[tuple[float, float]](), 0, True
    with (folder / "log").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while running and time.monotonic() - begun < limit:
            time.sleep(0.1)
            running = process.poll() is None
            lines = metrics_lines(folder / "list")
            curve += [(round(time.monotonic() - begun, 1), value) for value in ndcgs(lines[num_lines:])]
            num_lines = len(lines)
    finally:
        stop(process)
    if not running and process.returncode:
        raise RuntimeError(f"the training ended with code {process.returncode}: {last_line(folder / 'log')}")
    return {"command": " ".join(["python", *words]), "limit": limit, "ended": not running, "epochs": num_lines,
            **summary(curve, training.wanted), **run_results(folder / "list")}


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else "no output"


def metrics_lines(run_list: Path) -> list[str]:
    """Return the complete lines of metrics.jsonl of the run that is named in `run_list`."""
    if (run := run_folder(run_list)) is None or not (run / "metrics.jsonl").exists():
        return []
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return text[:text.rfind("\n") + 1].splitlines()


def run_folder(run_list: Path) -> Path | None:
    lines = run_list.read_text(encoding="utf-8").splitlines() if run_list.exists() else []
    return Path(lines[0]) if lines else None


def ndcgs(lines: list[str]) -> list[float]:
    """Return the validation ndcg@10 of each line that has metrics."""
    return [record["metrics"]["ndcg@10"] for record in map(json.loads, lines) if "metrics" in record]


def summary(curve: list[tuple[float, float]], wanted: float) -> dict:
    """Return the best value of a curve of (seconds, value), and the seconds until it reached `wanted` (or None)."""
    best: list[tuple[float, float]] = []
    for seconds, value in curve:
        if not best or value > best[-1][1]:
            best.append((seconds, value))
    return {"best": best[-1][1] if best else None, "wanted": wanted, "best_so_far": best,
            "seconds_to_reach": next((seconds for seconds, value in best if value >= wanted), None)}


def run_results(run_list: Path) -> dict:
    """Return the number of steps of a run, and its test metrics if it has ended."""
    run = run_folder(run_list)
    if run is None:
        return {"steps": 0}
    steps = [int(path.stem.removeprefix("step-")) for path in run.glob("checkpoints/step-*.safetensors")]
    result: dict = {"steps": max(steps, default=0)}
    if (run / "metrics.json").exists():
        test = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["alone"]["test"]["all"]
        result["test"] = {name: test[name] for name in ("recall@5", "ndcg@5", "recall@10", "ndcg@10")}
    return result


def stop(process: subprocess.Popen) -> None:
    """Ask a process to stop, and wait until it has stopped."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
