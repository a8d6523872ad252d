"""The pipeline of the recommendation stage."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.artifacts import DatasetFolder, load_items, load_users
from common.config import Config
from common.device import resolve_device
from common.distributed import process_group
from common.errors import DataError
from common.publishing import write_text
from common.run import Run
from recommendation.dataset import Sequences
from recommendation.evaluator import Predictions, cannot_rank, evaluate
from recommendation.export.t5 import initialize_from_t5, t5_inputs
from recommendation.metrics import mean_and_deviation
from recommendation.models import code_of, find_class
from recommendation.models.abstract_model import AbstractRecommender
from recommendation.runs import Choice, load_source, neighbours_from, read_metrics
from recommendation.trainer import train

log = logging.getLogger(__name__)


class Pipeline:
    """Load the inputs, train and test a recommender, and write the results to a run folder."""

    def __init__(self, config: Config, folder: DatasetFolder, choice: Choice, run_root: Path, command: str,
                 from_t5: Path | None = None):
        self.config, self.folder, self.from_t5 = config, folder, from_t5
        self.device = resolve_device(config["common"]["device"], config.origins["common.device"])
        self.model_class = find_class(config.name)
        self.catalogue, inputs, self.collisions = load_source(folder, choice, neighbours_from(config))
        if from_t5 is not None:
            inputs |= t5_inputs(from_t5, choice.training_command(folder, run_root))
        self.run = Run(choice.runs(run_root, folder.name), config.values, inputs, command, code_of(config.name))

    def execute(self, force: bool) -> dict:
        """Train and test the model, and return the content of metrics.json.

        If the run is already finished, only read its metrics.json, unless `force` is set.
        """
        if self.run.finished and not force:
            log.info("recommendation: reusing run %s of %s (it is finished; use --force to repeat it)",
                     self.run.id, self.config.name)
            self.run.make_latest()
            return read_metrics(self.run.folder, f"{self.run.command} --force")
        model, num_items, params = self._build(), self.catalogue.num_items, self.config.training_params
        sequences = Sequences.load(self.folder, self.device)
        self._require_held_out(sequences)
        with process_group(self.device), self.run.open(force):
            with self.run.clock("training"):
                best = train(model, sequences, self.config, self.run)
            with self.run.clock("test"):
                predictions, test = evaluate(model, sequences, "test", params, f"test {self.config.name}")
            result = {"valid": best.metrics, "test": test, "best_epoch": best.epoch,
                      "num_parameters": sum(p.numel() for p in model.parameters()), **model.properties(),
                      **self.collisions}
            write_text(self.run.folder / "metrics.json", json.dumps(result, indent=2) + "\n")
            self._write_predictions(predictions, sequences)
            if warning := cannot_rank(model, predictions.items, predictions.scores):
                log.warning("%s", warning)
            if test["num_without_history"]:
                log.warning("recommendation: %d test events are skipped, because their users have no earlier event",
                            test["num_without_history"])
            if test["missing_share"]:
                log.warning("recommendation: %.2f%% of the positions in the recommended lists are empty. The "
                            "catalogue has %d items, and a list has %d positions%s", 100 * test["missing_share"],
                            num_items, params["top_k"],
                            " and excludes the items of the history" if params["filter_seen"] else "")
            self.run.finish({"model": self.config.name, "dataset": self.folder.name,
                             "users_per_second": test["num_targets"] / self.run.seconds("test")})
        return result

    def _build(self) -> AbstractRecommender:
        """Return the untrained model on the device. Raises ConfigError if a configuration key is unused."""
        model_config = self.config.for_model()
        torch.manual_seed(self.config["common"]["seed"])
        model = self.model_class(model_config, self.catalogue)
        self.config.check_all_read(model_config)
        self.config.check_training_keys(model_config, by_gradient=model.trained_by_gradient())
        if self.from_t5 is not None:
            initialize_from_t5(model, self.folder, self.from_t5)
        return model.to(self.device)

    def _require_held_out(self, sequences: Sequences) -> None:
        """Raise DataError if no validation event or no test event has a history."""
        for split in ("valid", "test"):
            if not len(sequences.positions(split)):
                raise DataError(self.folder.interactions, f"has no event with a history in the {split} split",
                                "No user has three events", f"{self.folder.make_command} --min_user_interactions 3")

    def _write_predictions(self, predictions: Predictions, sequences: Sequences) -> None:
        """Write the test predictions to predictions.jsonl, with the raw ids of users and items."""
        raw_item, raw_user = load_items(self.folder)["raw_id"], load_users(self.folder)["raw_id"]
        users = raw_user[sequences.user[predictions.positions]]
        lines = []
        for user, target, items, scores in zip(users, raw_item[predictions.targets], predictions.items,
                                               predictions.scores, strict=True):
            found = items >= 0
            lines.append(json.dumps({"user": user, "target": target, "items": list(raw_item[items[found]]),
                                     "scores": np.round(scores[found].astype(float), 6).tolist()}, ensure_ascii=False))
        write_text(self.run.folder / "predictions.jsonl", "\n".join(lines) + "\n")


def run_seeds(config: Config, seeds: list[int], make_pipeline: Callable[[], Pipeline], force: bool) -> dict:
    """Train and test the model once for each seed. Return a summary, and write it to `seeds.json`.

    A finished run is not repeated, unless `force` is set. For each seed, this function changes the seed in `config` and
    then calls `make_pipeline`, which must use this `config`.
    """
    runs = {}
    for seed in seeds:
        config["common"]["seed"] = seed
        pipeline = make_pipeline()
        runs[pipeline.run.id] = pipeline.execute(force)
    summary = {"seeds": seeds, "runs": list(runs), "test": mean_and_deviation([run["test"] for run in runs.values()])}
    write_text(pipeline.run.parent / "seeds.json", json.dumps(summary, indent=2) + "\n")
    return summary
