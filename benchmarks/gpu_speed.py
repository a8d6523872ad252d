"""The measurements of speed of benchmarks/gpu.py, in a process of their own.

    python benchmarks/gpu_speed.py machine   # the card and the versions
    python benchmarks/gpu_speed.py measure   # most measurements
    python benchmarks/gpu_speed.py kernels   # the time of the kernels of a step; the profiler slows other measurements
    python benchmarks/gpu_speed.py decode    # only users per second, with the code of --checkout

Each result is printed as soon as it is measured, as a line `RESULT {"<name>": ...}`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
MARK = "RESULT "
FUSED = "captured, fused attention"
VARIANTS = {"captured": {}, "eager": {"capture": "false"}, "captured, bfloat16": {"precision": "bfloat16"}, FUSED: {}}
ALL_EPOCHS = 8_000  # the seconds of the quantizer are scaled to this number of epochs


class Scale(NamedTuple):
    """The amount of work of all measurements."""

    turns: int = 2                  # turns of each variant
    seconds: float = 2.0            # of a turn of captured steps; the other variants have a third of it
    batch_sizes: tuple = (256, 1024)  # only the last one is measured with all variants
    profiled_steps: int = 100
    rows: tuple = (12_000, 768)     # shape of the embeddings
    quantizer_epochs: int = 2_000
    eval_batch: int = 4_096         # histories in a batch of the decoding
    loop_epochs: int = 5
    num_users: int | None = None    # None: all users
    generator: tuple = ()           # replace sizes of the generator
    quantizer: tuple = ()           # replace sizes of the quantizer


SMOKE = Scale(1, 0.1, (32, 64), 6, (300, 24), 4, 64, 1, 40,
              (("num_encoder_layers", 1), ("num_decoder_layers", 1), ("d_model", 16), ("d_ff", 16), ("d_kv", 8),
               ("num_heads", 2)),
              (("hidden_sizes", [16]), ("latent_size", 4), ("codebook_size", 8), ("batch_size", 128),
               ("eval_every", 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("machine", "measure", "kernels", "decode"))
    parser.add_argument("--data_root", type=Path, default=ROOT / "data")
    parser.add_argument("--epochs", type=int, default=Scale().quantizer_epochs, help="epochs of the quantizer")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="for decode: the code to measure")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    args = parser.parse_args()
    sys.path[0] = str(ROOT)  # otherwise, `import recommendation` would import a benchmark
    import benchmarks.gpu_data  # noqa: F401 (of this checkout, with the other code of `--checkout`)

    sys.path.insert(0, str(args.checkout.resolve()))
    if args.what == "machine":
        report("machine", machine(args.smoke))
        return
    speed = Speed(args.data_root, SMOKE if args.smoke else Scale(quantizer_epochs=args.epochs), args.smoke)
    for name, measure in speed.measurements(args.what).items():
        begun = time.perf_counter()
        try:
            result = measure()
        except Exception as error:  # noqa: BLE001 (the other measurements must still run)
            result = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        report(name, {**result, "seconds": round(time.perf_counter() - begun, 1)})


def report(name: str, result: dict) -> None:
    print(MARK + json.dumps({name: result}), flush=True)


def machine(smoke: bool) -> dict:
    """Return the card, its driver, the number of cores, and the versions of the software."""
    from importlib import metadata
    from importlib.util import find_spec

    import torch

    cuda, driver = torch.cuda.is_available() and not smoke, None
    if cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):  # the other facts are still useful
            driver = None
    return {"card": torch.cuda.get_device_name() if cuda else None, "driver": driver,
            "cuda": torch.version.cuda if cuda else None, "torch": torch.__version__,
            "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)),
            "duckdb": metadata.version("duckdb") if find_spec("duckdb") else None}


class Speed:
    """All measurements of speed."""

    def __init__(self, data_root: Path, scale: Scale, smoke: bool):
        import torch

        from benchmarks.gpu_data import load

        self.scale, self.cuda, self.smoke = scale, torch.cuda.is_available() and not smoke, smoke
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.data = load(data_root, self.device, scale.num_users)

    def measurements(self, what: str) -> dict[str, Callable[[], dict]]:
        """Return the measurements of a command, in their order."""
        if what != "measure":
            return {"decode": {"decoding": self.decoding}, "kernels": {"kernels": self.kernels}}[what]
        return {"loop": self.loop,
                **{f"training {named}": lambda size=size: self.training(size)
                   for named, size in zip(Scale().batch_sizes, self.scale.batch_sizes, strict=True)},
                "quantizer": self.quantizer, "evaluation": self.evaluation, "decoding": self.decoding}

    def synchronize(self) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()

    def loop(self) -> dict:
        """Measure the CPU time of the training loop around a step that does nothing."""
        import torch

        from benchmarks.gpu_data import Data, empty_task
        from common.run import Run
        from common.training import TrainingLoop
        from recommendation.dataset import Sequences

        events, times, num_threads = self.data.sequences, [], torch.get_num_threads()
        data = Data(Sequences(events.item, events.user, events.split), None, "")
        torch.set_num_threads(1)  # the time of waiting threads would count too
        for _ in range(3):
            task = empty_task(data, self.scale.loop_epochs)
            with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as scratch:
                run = Run(Path(scratch), {}, {}, "python benchmarks/gpu.py")
                with run.open(force=False):
                    begun = time.process_time()
                    TrainingLoop(task, run, task.params, 0).train()
                    times.append((time.process_time() - begun) / task.descent.total_steps)
        torch.set_num_threads(num_threads)
        return {"microseconds": 1e6 * min(times), "steps": task.descent.total_steps}

    def training(self, batch_size: int) -> dict:
        """Measure the targets per second of the training steps, in turns. Padding is not counted."""
        from recommendation.models import layers

        result: dict[str, Any] = {"data": self.data.origin, "batch_size": batch_size}
        variants = list(VARIANTS) if batch_size == self.scale.batch_sizes[-1] else ["captured", "eager"]
        if FUSED in variants and not hasattr(layers, "FUSED_ATTENTION"):
            variants.remove(FUSED)
            result["left_out"] = f"{FUSED}: models/layers.py has no FUSED_ATTENTION"
        contenders = {variant: Contender(self, batch_size, variant) for variant in variants}
        turns: dict[str, list[tuple[int, float]]] = {variant: [] for variant in variants}
        for _ in range(self.scale.turns):
            for variant, contender in contenders.items():
                turns[variant].append(contender.turn(self.scale.seconds / (1 if variant == "captured" else 3)))
        for variant, contender in contenders.items():
            num_targets, seconds = map(sum, zip(*turns[variant], strict=True))
            result[variant] = {"targets_per_second": num_targets / seconds,
                               "of_turns": [targets / time for targets, time in turns[variant]],
                               **contender.facts()}
        return result

    def kernels(self) -> dict:
        """Compare the wall time of captured steps with the time of their kernels, for the same steps."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        contender = Contender(self, self.scale.batch_sizes[0], "captured")
        steps = range(contender.task.num_steps, contender.task.num_steps + self.scale.profiled_steps)
        contender.take(steps)  # builds the batches of the epoch
        wall = min(contender.take(steps)[1] for _ in range(3))
        kind = (ProfilerActivity.CUDA, DeviceType.CUDA) if self.cuda else (ProfilerActivity.CPU, DeviceType.CPU)
        with profile(activities=[kind[0]]) as profiler:
            contender.take(steps)
        kernels = [event for event in profiler.events()
                   if event.device_type == kind[1] and not event.is_user_annotation]
        busy = sum(event.time_range.elapsed_us() if self.cuda else event.self_cpu_time_total for event in kernels) / 1e6
        if not busy:
            raise RuntimeError("the profiler saw no kernels")
        if self.cuda and wall < 0.98 * busy:  # some versions of CUPTI report wrong times for the kernels of graphs
            raise RuntimeError(f"the profiler reports {busy:.3f} s of kernels in {wall:.3f} s")
        return {"ratio": wall / busy, "milliseconds_per_step": 1e3 * wall / len(steps),
                "kernel_milliseconds_per_step": 1e3 * busy / len(steps), "kernels_per_step": len(kernels) / len(steps)}

    def rows(self):
        import numpy as np

        from benchmarks.quantization import generated

        return np.concatenate(list(generated(*self.scale.rows)))

    def quantizer(self) -> dict:
        """Measure a whole training of an RQ-VAE, with k-means at the start and the evaluations."""
        from benchmarks.gpu_data import RQVAE
        from benchmarks.quantization import train_ours

        xs, ends, epochs = self.rows(), [], self.scale.quantizer_epochs
        keys = {**RQVAE, **dict(self.scale.quantizer), "epochs": epochs}
        begun = time.perf_counter()
        train_ours(xs, 0, self.device.type, lambda _model: ends.append(time.perf_counter() - begun), **keys)
        total = time.perf_counter() - begun
        return {"epochs": epochs, "seconds_of_training": total, "seconds_of_first_epoch": ends[0],
                "seconds_of_8000_epochs": ends[0] + (total - ends[0]) * (ALL_EPOCHS - 1) / (epochs - 1)}

    def evaluation(self) -> dict:
        """Measure an evaluation of an RQ-VAE."""
        import torch

        from benchmarks.gpu_data import quantizer_task

        task, times = quantizer_task(self.rows(), self.device, dict(self.scale.quantizer)), []
        task.model.eval()
        with torch.no_grad():
            for _ in range(6):
                begun = time.perf_counter()
                task.evaluate()
                times.append(time.perf_counter() - begun)
        return {"milliseconds": 1e3 * statistics.median(times[1:])}

    def decoding(self) -> dict:
        """Measure the users per second of beam search on the test split, with random weights."""
        from benchmarks.gpu_data import generator, generator_config
        from recommendation.evaluator import predict

        model = generator(generator_config(dict(self.scale.generator)), self.data).eval()
        params = {"max_history": 20, "top_k": 20, "eval_batch_size": self.scale.eval_batch}
        rates = []
        for _ in range(4):
            begun = time.perf_counter()
            num_users = len(predict(model, self.data.sequences, "test", params, "all").targets)
            rates.append(num_users / (time.perf_counter() - begun))
        return {"users_per_second": statistics.median(rates[1:]), "users": num_users, "data": self.data.origin}


class Contender:
    """The training of a generator with one variant of the step."""

    def __init__(self, speed: Speed, batch_size: int, variant: str):
        from benchmarks.gpu_data import generator_task

        self.speed, self.variant = speed, variant
        before = self._start_memory()
        self.task = generator_task(speed.data, {**dict(speed.scale.generator), "batch_size": batch_size,
                                                **VARIANTS[variant]}, self._graphs())
        begun = time.perf_counter()
        self._warm_up()
        self.warm_up_seconds = time.perf_counter() - begun
        self.peak_gb = (self._peak_memory() - before) / 1e9
        self.position = self.task.num_steps  # the next step
        self.seconds_per_step = self.take(range(10))[1] / 10

    def _graphs(self):
        if not self.speed.smoke or self.variant == "eager":
            return None  # on a GPU, the training itself chooses CUDA graphs
        from tests.recorded_graphs import RecordedGraphs

        return RecordedGraphs()

    def _start_memory(self) -> int:
        import torch

        if not self.speed.cuda:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()

    def _peak_memory(self) -> int:
        import torch

        return torch.cuda.max_memory_reserved() if self.speed.cuda else 0

    def _warm_up(self) -> None:
        """Take five steps of each shape: two are eager, two are compared, and the last one is only a replay."""
        from common.data_parallel import WHOLE

        batches, first = self.task.batches, {}
        with self._context():
            for index in range(self.task.num_steps):
                first.setdefault(batches.get(0, index, WHOLE).items.shape, index)
            for _ in range(2 if self.variant == "eager" else 5):
                for index in first.values():
                    self.task.step(0, index)
            self.speed.synchronize()
        if self.variant != "eager" and not self._num_captured():
            raise RuntimeError("the steps were not captured")

    @contextmanager
    def _context(self) -> Iterator[None]:
        from recommendation.models import layers

        fused = mock.patch.object(layers, "FUSED_ATTENTION", True) if self.variant == FUSED else nullcontext()
        with fused, self.task.descent.stream():
            yield

    def _num_captured(self) -> int:
        captured = self.task.descent.captured
        return sum(shape.replay is not None for shape in captured.shapes.values()) if captured else 0

    def turn(self, seconds: float) -> tuple[int, float]:
        """Train for about some seconds. Return the number of targets and the exact seconds."""
        # The number of steps is fixed beforehand, because the CPU may be many steps ahead of the GPU.
        steps = range(self.position, self.position + max(round(seconds / self.seconds_per_step), 1))
        self.position = steps.stop
        return self.take(steps)

    def take(self, steps: range) -> tuple[int, float]:
        """Take training steps. Return the number of targets and the seconds."""
        task, num_targets = self.task, 0
        with self._context():
            self.speed.synchronize()
            begun = time.perf_counter()
            for number in steps:
                epoch, index = divmod(number, task.num_steps)
                task.step(epoch, index)
                num_targets += task.batches.num_targets(epoch, index)
            self.speed.synchronize()
            return num_targets, time.perf_counter() - begun

    def facts(self) -> dict:
        return {"shapes": len(self.task.batches.shapes), "captured_shapes": self._num_captured(),
                "warm_up_seconds": self.warm_up_seconds, "peak_gb": self.peak_gb}


if __name__ == "__main__":
    main()
