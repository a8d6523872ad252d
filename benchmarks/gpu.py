"""Tests and measurements on a GPU. Together, they take at most five minutes on an H100.

    bash benchmarks/gpu.sh tests      # the tests marked `gpu`
    bash benchmarks/gpu.sh speed      # targets per second, time of kernels, RQ-VAE, decoding
    bash benchmarks/gpu.sh quality    # validation metrics of a training on Beauty with LETTER's semantic IDs
    bash benchmarks/gpu.sh all        # these three parts
    bash benchmarks/gpu.sh precision  # two trainings of 60 seconds, with float32 and with bfloat16
    bash benchmarks/gpu.sh page       # write benchmarks/gpu.md from the results

The results are written to benchmarks/results/gpu.json after each measurement. Nothing is downloaded: the dataset Beauty
with its semantic IDs is read from --data_root, and missing packages are installed from the folder --wheels. Without
Beauty or DuckDB, the speed is measured with generated data, and `quality` is left out.

The exit code is 1 if a test or a measurement fails. A missed goal is reported, but it is not a failure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks import gpu_results  # noqa: E402 (needs the path above)
from benchmarks.gpu_quality import BEAUTY, TEA_SHOP, Training, last_line, watch  # noqa: E402
from benchmarks.gpu_results import PAGE, RESULTS  # noqa: E402
from benchmarks.gpu_speed import MARK  # noqa: E402

ALL_SECONDS = 295                          # of all parts together
LIMITS = {"tests": 240, "speed": 240}      # seconds; then the processes are ended
SMOKE_TESTS = "sasrec or rvq or imported"  # the other models need minutes on a CPU
PAIRS = 3                                  # pairs of runs with --base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tests", "speed", "quality", "all", "precision", "page"))
    parser.add_argument("--data_root", type=absolute, default=ROOT / "data", help="folder of the datasets")
    parser.add_argument("--wheels", type=absolute, default=None, help="folder of wheels to install for this run only")
    parser.add_argument("--out", type=absolute, default=None, help=f"results (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--base", type=absolute, default=None, help="another checkout, whose decoding is measured too")
    parser.add_argument("--epochs", type=int, default=2_000, help="epochs of RQ-VAE that are measured, then scaled")
    parser.add_argument("--flags", default="", help="for quality and precision: more flags of the training, as one "
                        "word: --flags='--batch_size=1024 --epochs=60'")
    parser.add_argument("--commit", default=None, help="for page, without results: the commit that was not measured")
    parser.add_argument("--smoke", action="store_true", help="run everything on the CPU with tiny sizes")
    args = parser.parse_args()
    if args.what == "page":
        write_page(args.out or RESULTS, args.commit)
        return
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as scratch:
        sys.exit(Benchmark(args, Path(scratch)).run())


def absolute(path: str) -> Path:
    """Return the absolute path, because the commands run in another folder."""
    return Path(path).resolve()


def write_page(path: Path, commit: str | None) -> None:
    """Write the page of the results in the file `path`: benchmarks/gpu.md, or a file next to other results.

    commit: the commit that was not measured, for a page without results
    """
    results = gpu_results.load(path)
    if commit is not None and not results.get("parts"):
        results = {"commit": commit, "parts": {}}
        gpu_results.save(path, results)
    if not results:
        raise SystemExit(f"error: {path}: no results. Fix: bash benchmarks/gpu.sh all, or add --commit")
    page = PAGE if path == RESULTS else path.with_suffix(".md")
    page.write_text(gpu_results.page(results), encoding="utf-8")


class Benchmark:
    """Runs the parts, and writes their results."""

    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args, self.scratch, self.begun = args, scratch, time.monotonic()
        self.out = args.out or (Path(tempfile.mkdtemp(prefix="gpu-smoke-")) / "gpu.json" if args.smoke else RESULTS)
        self.environment = self._environment()
        self.head = {"commit": short_commit(), "dirty": is_dirty(), "smoke": args.smoke, "machine": self._machine()}
        self.results = gpu_results.load(self.out)

    def run(self) -> int:
        """Run the parts, and return the exit code."""
        parts = {"tests": self.tests, "speed": self.speed, "quality": self.quality, "precision": self.precision}
        chosen = ("tests", "speed", "quality") if self.args.what == "all" else (self.args.what,)
        for part in chosen:
            begun = time.monotonic()
            result: dict = {}
            try:
                for measured in parts[part]():
                    result |= measured
                    self._save(part, result, begun)
            except Exception as error:  # noqa: BLE001 (the other parts must still run)
                result |= {"error": f"{type(error).__name__}: {error}"}
            self._save(part, result, begun)
            print(f"{part}: {result['seconds']:.0f} s", flush=True)
        own = {part: self.results["parts"][part] for part in chosen}
        write_page(self.out, None)
        for name, goal in {} if self.args.smoke else self.results["goals"].items():
            print(f"  {name}: {goal['value']} {goal['result']}")
        for line in gpu_results.left_out(own):
            print(f"  left out: {line}")
        for line in (failed := gpu_results.failures(own)):
            print(f"  FAILED: {line}")
        print(f"{time.monotonic() - self.begun:.0f} s in all; results: {self.out}")
        return 1 if failed else 0

    def _save(self, part: str, result: dict, begun: float) -> None:
        result["seconds"] = round(time.monotonic() - begun, 1)
        head = {**self.head, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.results = gpu_results.merge(self.results, head, part, result)
        gpu_results.save(self.out, self.results)

    def _environment(self) -> dict[str, str]:
        """Return the environment of all commands. Install the wheels into a temporary folder."""
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        if self.args.wheels:
            wheels = sorted(map(str, self.args.wheels.glob("*.whl")))
            if not wheels:
                raise SystemExit(f"error: --wheels {self.args.wheels}: has no wheels. Fix: correct the folder")
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                            "--no-index", "--no-deps", "--target", str(self.scratch / "wheels"), *wheels], check=True)
            path.insert(0, str(self.scratch / "wheels"))
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}

    def _machine(self) -> dict:
        [machine] = (result["machine"] for result in self._measured("machine"))
        if not machine["card"] and not self.args.smoke:
            raise SystemExit("error: no CUDA device. Fix: run this on a machine with a GPU, or add --smoke")
        return machine

    def tests(self) -> Iterator[dict]:
        """Run the tests marked `gpu`: the two stages at the same time, because a test rarely uses the whole GPU."""
        environment, selection = self.environment, list[str]()
        if self.args.smoke:
            environment, selection = {**environment, "GPU_TESTS_ON_CPU": "1"}, ["-k", SMOKE_TESTS]
        processes = {}
        for file in sorted(ROOT.glob("tests/*/test_gpu.py")):
            report = self.scratch / f"{file.parent.name}.xml"
            command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", str(file), *selection]
            with report.with_suffix(".log").open("w") as output:
                processes[report] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output,
                                                     stderr=subprocess.STDOUT)
        limit = threading.Timer(LIMITS["tests"], lambda: [process.kill() for process in processes.values()])
        limit.start()
        codes = {report: process.wait() for report, process in processes.items()}
        limit.cancel()
        for report, code in codes.items():
            log = report.with_suffix(".log")
            if code:
                print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
            if code not in (0, 1) or not report.exists():
                raise RuntimeError(f"pytest ended with code {code}: {last_line(log)}")
        yield test_counts([report.read_text(encoding="utf-8") for report in codes])

    def speed(self) -> Iterator[dict]:
        """Measure the speed; yield each result as soon as it is measured."""
        yield from self._measured("measure", f"--epochs={self.args.epochs}")
        yield from self._measured("kernels")
        if self.args.base:
            yield {"decoding pairs": self._pairs()}

    def _pairs(self) -> dict:
        """Measure the decoding of this checkout and of --base in turns."""
        rates: dict[Path, list[float]] = {ROOT: [], self.args.base: []}
        for _ in range(PAIRS):
            for checkout, found in rates.items():
                [result] = self._measured("decode", f"--checkout={checkout}")
                if "error" in result["decoding"]:
                    raise RuntimeError(f"{checkout}: {result['decoding']['error']}")
                found.append(result["decoding"]["users_per_second"])
        ours, base = rates.values()
        return {"ratio": gpu_results.median_ratio(ours, base), "users_per_second": ours, "of_base": base}

    def _measured(self, what: str, *flags: str) -> Iterator[dict]:
        """Run gpu_speed.py, and yield its results."""
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_speed.py"), what, *flags,
                   f"--data_root={self.args.data_root}", *(["--smoke"] if self.args.smoke else [])]
        log = self.scratch / f"{what}.log"
        with log.open("w") as errors, subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE,
                                                       stderr=errors, text=True) as process:
            limit = threading.Timer(LIMITS["speed"], process.kill)
            limit.start()
            for line in process.stdout or ():
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
            limit.cancel()
        if process.returncode:
            raise RuntimeError(f"gpu_speed.py {what} ended with code {process.returncode}: {last_line(log)}")

    def quality(self) -> Iterator[dict]:
        """Train on Beauty, and record when the validation metric reaches its goal. Read the test metrics once."""
        training = TEA_SHOP if self.args.smoke else BEAUTY
        if reason := self._prepare(training):
            yield {"left_out": reason}
            return
        # All parts together take at most five minutes.
        left = ALL_SECONDS - (time.monotonic() - self.begun) if self.args.what == "all" else training.seconds
        yield self._watch(training, max(min(training.seconds, left), 60))

    def precision(self) -> Iterator[dict]:
        """Train for the same time with float32 and with bfloat16."""
        training = TEA_SHOP if self.args.smoke else BEAUTY
        if reason := self._prepare(training):
            yield {"left_out": reason}
            return
        for name in ("float32", "bfloat16"):
            yield {name: self._watch(training, training.seconds_of_precision, f"--precision={name}")}

    def _watch(self, training: Training, limit: float, *flags: str) -> dict:
        flags = (*self.args.flags.split(), *flags)
        return watch(training, limit, flags, self.args.data_root, self.scratch, self.environment)

    def _prepare(self, training: Training) -> str:
        """Return why the training is impossible, or "". In a smoke test, make the dataset."""
        if self.head["machine"]["duckdb"] is None:
            return "DuckDB is not installed, and the commands read Parquet files with it"
        if not self.args.smoke:
            folder = self.args.data_root / training.dataset
            present = (folder / f"{training.dataset}.codes-imported-td.npy").exists()
            return "" if present else f"{folder} has no dataset with imported semantic IDs"
        self.args.data_root, shop = self.scratch / "data", ROOT / "examples" / "shop"
        common = ["--dataset", training.dataset, "--data_root", str(self.args.data_root)]
        self._command("dataloader.pipeline", *common, "--interactions", str(shop / "orders.csv"), "--items",
                      str(shop / "catalogue.csv"), "--user_column=customer", "--item_column=sku",
                      "--time_column=bought_at", "--time_unit=date", "--rating_column=stars", "--title_column=name",
                      "--description_column=details", "--categories_column=group", "--text_model=tfidf")
        self._command("quantization.main", *common, "--quantizer_name=random", "--device=cpu", "--run_root",
                      str(self.scratch / "quantizers"))
        return ""

    def _command(self, module: str, *flags: str) -> None:
        log = self.scratch / f"{module}.log"
        with log.open("w") as output:
            code = subprocess.run([sys.executable, "-P", "-m", module, *flags], cwd=self.scratch, env=self.environment,
                                  stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        if code:
            raise RuntimeError(f"{module} ended with code {code}: {last_line(log)}")


def short_commit() -> str:
    return git("rev-parse", "--short=7", "HEAD") or "unknown"


def is_dirty() -> bool:
    """Return whether the code differs from the commit. The results and the page do not count."""
    return bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results",
                    ":!benchmarks/gpu.md"))


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()


def test_counts(reports: list[str]) -> dict:
    """Return the numbers of passed, failed and skipped tests in JUnit reports, and the names of those that failed."""
    cases = [case for report in reports for case in ElementTree.fromstring(report).iter("testcase")]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped,
            "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed]}


if __name__ == "__main__":
    main()
