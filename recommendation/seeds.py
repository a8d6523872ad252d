"""One configuration with several seeds: mean and deviation of its test figures."""

import json

import numpy as np

from common.config import Config
from common.publishing import write_text
from recommendation.pipeline import Pipeline


def run_seeds(config: Config, seeds: list[int], make_pipeline, force: bool) -> dict:
    """Run each seed, or reuse its finished run, and write `seeds.json` beside the runs; returns its content.

    `make_pipeline()` gives the pipeline of `config` as it stands.
    """
    runs, pipeline = {}, None
    for seed in seeds:
        config["common"]["seed"] = seed
        pipeline: Pipeline = make_pipeline()
        runs[pipeline.run.id] = pipeline.execute(force)
    summary = {"seeds": seeds, "runs": list(runs), "test": mean_and_deviation([run["test"] for run in runs.values()])}
    write_text(pipeline.run.parent / "seeds.json", json.dumps(summary, indent=2) + "\n")
    return summary


def mean_and_deviation(figures: list[dict]) -> dict[str, dict[str, float | None]]:
    """`metric -> {mean, deviation}` over seeds; the sample's standard deviation, None for a single seed."""
    names = [name for name, value in figures[0].items() if isinstance(value, float) and not name.endswith("_stderr")
             and all(name in of_seed for of_seed in figures)]
    values = {name: np.array([run[name] for run in figures]) for name in names}
    return {name: {"mean": float(value.mean()), "deviation": float(value.std(ddof=1)) if len(value) > 1 else None}
            for name, value in values.items()}
