"""The results of benchmarks/gpu.py: the goals, the JSON file, and the page gpu.md."""

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
RESULTS, PAGE = FOLDER / "results" / "gpu.json", FOLDER / "gpu.md"
REACHED_NDCG = 0.0475  # validation ndcg@10 that the training must reach
NOT_SLOWER = 0.97      # two runs of the same code differ by up to 3 %


class Goal(NamedTuple):
    """A number that should reach a gate, and better an aim."""

    name: str
    path: tuple[str, ...]   # keys of the number in the parts of the results
    form: str               # format of the number
    before: float | None    # on an H100, at commit 5ab4e41
    gate: float | None
    aim: float | None
    higher_is_better: bool = True


def training(batch_size: int) -> tuple[str, ...]:
    return "speed", f"training {batch_size}", "captured", "targets_per_second"


GOALS = [
    Goal("Generator, batch 256: targets per second", training(256), ",.0f", 7_500, 40_000, 80_000),
    Goal("Generator, batch 1,024: targets per second", training(1024), ",.0f", 21_000, 110_000, 200_000),
    Goal("Captured step, batch 256: time / time of its kernels", ("speed", "kernels", "ratio"), ".2f",
         7.4, 1.2, 1.1, higher_is_better=False),
    Goal("RQ-VAE, 8,000 epochs: seconds", ("speed", "quantizer", "seconds_of_8000_epochs"), ",.0f",
         350, 60, 40, higher_is_better=False),
    Goal(f"Beauty: seconds until validation ndcg@10 is {REACHED_NDCG}", ("quality", "seconds_to_reach"), ",.0f",
         260, 180, None, higher_is_better=False),
    Goal("Beauty: test recall@10", ("quality", "test", "recall@10"), ".4f", None, None, 0.0656),
    Goal("Decoding, 20 beams: users per second", ("speed", "decoding", "users_per_second"), ",.0f",
         19_400, None, 30_000),
    Goal("Decoding in pairs: users per second / those of `--base`", ("speed", "decoding pairs", "ratio"), ".2f",
         None, NOT_SLOWER, None),
    Goal("Training loop without a step: µs of CPU time per step", ("speed", "loop", "microseconds"), ",.0f",
         560, 150, None, higher_is_better=False),
    Goal("Evaluation of RQ-VAE: ms", ("speed", "evaluation", "milliseconds"), ",.1f",
         None, None, None, higher_is_better=False),
]


def value_of(goal: Goal, parts: dict) -> float | None:
    """Return the measured number: None if it was not measured, and inf if a training has not reached its goal."""
    value: Any = parts
    for key in goal.path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return math.inf if value is None else value


def reached(goal: Goal, value: float | None) -> str:
    """Return `aim`, `gate` or `missed`: the best of both that the value reaches. The text is empty without both."""
    if value is None:
        return ""
    sign = 1 if goal.higher_is_better else -1
    for name, bound in (("aim", goal.aim), ("gate", goal.gate)):
        if bound is not None and sign * value >= sign * bound:
            return name
    return "missed" if goal.gate is not None or goal.aim is not None else ""


def merge(old: dict, head: dict, part: str, result: dict) -> dict:
    """Return the results with a new result of a part. Results of another commit or machine are dropped.

    head: the commit, the machine and the date of the new result
    """
    same = all(old.get(key) == head[key] for key in ("commit", "dirty", "smoke", "machine"))
    parts = {**(old["parts"] if same else {}), part: result}
    goals = {goal.name: {"value": shown(goal, value), "result": reached(goal, value)} for goal in GOALS
             if (value := value_of(goal, parts)) is not None}
    return {**head, "parts": parts, "goals": goals}


def failures(parts: dict) -> list[str]:
    """Return a line for each failed test and for each error. A missed goal is not a failure."""
    lines = [f"tests: {name} failed" for name in parts.get("tests", {}).get("failures", [])]
    for part, result in parts.items():
        measured = {part: result, **{f"{part}, {name}": value for name, value in result.items()}}
        lines += [f"{name}: {value['error']}" for name, value in measured.items()
                  if isinstance(value, dict) and "error" in value]
    return lines


def left_out(parts: dict) -> list[str]:
    """Return a line for each part, and for each measurement, that was left out, with the reason."""
    lines = []
    for part, result in parts.items():
        measured = {part: result, **{f"{part}, {name}": value for name, value in result.items()}}
        lines += [f"{name}: {value['left_out']}" for name, value in measured.items()
                  if isinstance(value, dict) and "left_out" in value]
    return lines


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(path: Path, results: dict) -> None:
    """Write the results such that the file is complete at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".staged")
    staged.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    os.replace(staged, path)


def page(results: dict) -> str:
    """Return the content of gpu.md."""
    parts, missing = results.get("parts", {}), f"not run at {results['commit']}"
    rows = ["| measurement | before | gate | aim | measured | reached |", "|---|---|---|---|---|---|"]
    for goal in GOALS:
        value = value_of(goal, parts)
        before, gate, aim = (shown(goal, number) for number in (goal.before, goal.gate, goal.aim))
        rows.append(f"| {goal.name} | {before} | {gate} | {aim} | {shown(goal, value) or missing} | "
                    f"{reached(goal, value)} |")
    sections = [HEAD, origin(results), "\n".join(rows), NOTES, "## Tests\n\n" + tests_line(parts.get("tests"), missing),
                "## Variants of the training step\n\n" + variants(parts.get("speed", {}), missing)]
    if lines := details(parts):
        sections.append("## Details\n\n" + "\n".join(f"- {line}" for line in lines))
    if "precision" in parts:
        sections.append("## float32 and bfloat16\n\n" + precisions(parts["precision"]))
    if lines := failures(parts) + left_out(parts):
        sections.append("## Errors, and measurements that were left out\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(sections) + "\n"


HEAD = """# Measurements on a GPU

`python benchmarks/gpu.py page` generates this page from `results/gpu.json`. [README.md](README.md#on-a-gpu-gpush)
explains how to run the measurements."""

NOTES = """- before: one H100, torch 2.11, commit 5ab4e41. gate, aim: the wanted numbers on an H100.
- Generator: `encoder_decoder`, every position, 4 + 4 layers (d_model 128, d_ff 1024, 6 heads of width 64), dropout 0.1,
  histories of at most 20 items, float32. Targets of padding are not counted.
- RQ-VAE: 768-512-256-128 -> 32, 3 levels of 256 codes, 12,000 items, batch 2,048, an evaluation every 500 epochs. Fewer
  epochs are measured and scaled: the first epoch, with k-means, counts once.
- Beauty: LETTER's semantic IDs, `train_on: every_position`; the time begins with the start of the process."""


def shown(goal: Goal, value: float | None) -> str:
    if value is None:
        return ""
    return format(value, goal.form) if math.isfinite(value) else "not reached"


def origin(results: dict) -> str:
    """Return a line about the machine and the commit of the results."""
    if not results.get("parts"):
        return f"No results: not run at {results['commit']}."
    machine, dirty = results["machine"], " with changes" if results["dirty"] else ""
    smoke = "\n\nThis was a smoke test: the numbers have no meaning." if results["smoke"] else ""
    seconds = ", ".join(f"{part} {result['seconds']:.0f} s" for part, result in results["parts"].items())
    return (f"{machine['card'] or 'CPU'}, driver {machine['driver']}, CUDA {machine['cuda']}, torch "
            f"{machine['torch']}, Python {machine['python']}, {machine['cores']} cores. Commit "
            f"{results['commit']}{dirty}, {results['date']}. Time of each part: {seconds}.{smoke}")


def tests_line(tests: dict | None, missing: str) -> str:
    if tests is None or "passed" not in tests:
        return f"{missing[:1].upper()}{missing[1:]}."
    return f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped."


def variants(speed: dict, missing: str) -> str:
    """Return a table of the variants of the training step."""
    measured = [(name.removeprefix("training "), variant, values) for name, of_size in speed.items()
                if name.startswith("training ") and "error" not in of_size
                for variant, values in of_size.items() if isinstance(values, dict) and "targets_per_second" in values]
    if not measured:
        return f"{missing[:1].upper()}{missing[1:]}."
    rows = ["| batch | step | targets per second | captured shapes | seconds to capture all | peak memory, GB |",
            "|---|---|---|---|---|---|"]
    rows += [f"| {size} | {variant} | {values['targets_per_second']:,.0f} | {values['captured_shapes']} | "
             f"{values['warm_up_seconds']:.1f} | {values['peak_gb']:.2f} |" for size, variant, values in measured]
    return "\n".join(rows)


def details(parts: dict) -> list[str]:
    """Return lines about the measurements behind the goals."""
    speed, quality, lines = parts.get("speed", {}), parts.get("quality", {}), []
    if "seconds_of_training" in (rqvae := speed.get("quantizer", {})):
        lines.append(f"RQ-VAE: {rqvae['epochs']:,} epochs took {rqvae['seconds_of_training']:.1f} s, the first epoch "
                     f"{rqvae['seconds_of_first_epoch']:.1f} s.")
    if "ratio" in (kernels := speed.get("kernels", {})):
        lines.append(f"Captured step, batch 256: {kernels['milliseconds_per_step']:.2f} ms; "
                     f"{kernels['kernels_per_step']:.0f} kernels of {kernels['kernel_milliseconds_per_step']:.2f} ms.")
    if "data" in (decoding := speed.get("decoding", {})):
        lines.append(f"Events and semantic IDs of the speed: {decoding['data']}.")
    if "best" in quality:
        end = "ended by itself" if quality["ended"] else f"was stopped after {quality['limit']:.0f} s"
        lines.append(f"Beauty: {quality['epochs']} epochs, best validation ndcg@10 {quality['best'] or 0:.4f}; the "
                     f"training {end}. `{quality['command']}`")
    return lines


def precisions(precision: dict) -> str:
    """Return a table of two trainings of the same time."""
    rows = ["| precision | seconds | epochs | steps | best validation ndcg@10 |", "|---|---|---|---|---|"]
    rows += [f"| {name} | {run['limit']:.0f} | {run['epochs']} | {run['steps']:,} | {run['best'] or 0:.4f} |"
             for name, run in precision.items() if isinstance(run, dict) and "steps" in run]
    return "\n".join(rows)


def median_ratio(ours: list[float], others: list[float]) -> float:
    """Return the median of the ratios of the pairs."""
    return statistics.median(one / other for one, other in zip(ours, others, strict=True))
