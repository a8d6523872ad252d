"""One recommender from artifacts to metrics: wiring only."""

import json
import logging
from pathlib import Path

import numpy as np
import torch

from common.artifacts import DatasetFolder, load_codes, load_items, load_meta, load_users, variant, write_text
from common.config import Config
from common.device import resolve_device
from common.distributed import process_group
from common.errors import DataError
from common.progress import Progress
from common.run import Run, read_json
from recommendation.dataset import Sequences
from recommendation.evaluator import Predictions, metrics, predict
from recommendation.models import find_class
from recommendation.models.abstract_model import AbstractRecommender, Catalogue
from recommendation.trainer import Trainer

log = logging.getLogger(__name__)

NO_CODES = "no-codes"  # the variant's name where a model reads no semantic IDs


class Pipeline:
    """Loads what a recommender needs, trains it, tests it once, and writes the run."""

    def __init__(self, config: Config, folder: DatasetFolder, quantizer: str, suffix: str, tag: str | None,
                 run_root: Path, command: str):
        self.config, self.folder = config, folder
        self.device = resolve_device(config["common"]["device"], config.origins["common.device"])
        self.model_class = find_class(config.name)
        inputs = {folder.interactions.name: load_meta(folder.interactions, folder.make_command)["sha256"]}
        if self.model_class.needs_codes:
            codes, meta = load_codes(folder, quantizer, suffix, tag)
            inputs[folder.codes(quantizer, suffix, tag).name] = meta["sha256"]
            self.catalogue = Catalogue(len(codes), torch.from_numpy(codes).long(), meta["codebook_sizes"])
            self.collisions = {k: meta[k] for k in ("collision_rate_before", "collision_rate_after")}
        else:
            num_items = load_meta(folder.items, folder.make_command)["num_items"]
            self.catalogue, self.collisions = Catalogue(num_items, None, []), {}
        of_codes = variant(quantizer, suffix, tag) if self.model_class.needs_codes else NO_CODES
        self.run = Run(run_root / "recommendation" / folder.name / config.name / of_codes, config.values, inputs,
                       command)

    def execute(self, force: bool) -> dict:
        """Train and test, or reuse the finished run; returns the content of its metrics.json."""
        if self.run.finished and not force:
            log.info("recommendation: reusing run %s of %s (finished; --force repeats it)", self.run.id,
                     self.config.name)
            self.run.make_latest()
            return read_json(self.run.folder / "metrics.json", f"{self.run.command} --force")
        model = self._build()
        sequences = Sequences.load(self.folder, self.device)
        self._require_held_out(sequences)
        with process_group(self.device), self.run.open(force):
            best = Trainer(model, sequences, self.config, self.run).train()
            predictions = self._test(model, sequences)
            result = {"valid": best.metrics, "test": metrics(predictions), "best_epoch": best.epoch,
                      "num_parameters": sum(p.numel() for p in model.parameters()), **self.collisions}
            write_text(self.run.folder / "metrics.json", json.dumps(result, indent=2) + "\n")
            self._write_predictions(predictions, sequences)
            self.run.finish({"model": self.config.name, "dataset": self.folder.name})
        return result

    def _build(self) -> AbstractRecommender:
        """The model, all of its configuration read."""
        model_config = self.config.for_model()
        torch.manual_seed(self.config["common"]["seed"])
        model = self.model_class(model_config, self.catalogue)
        self.config.check_all_read(model_config)
        return model.to(self.device)

    def _require_held_out(self, sequences: Sequences) -> None:
        """Nothing to select or to test a model by is found out before training, not behind it."""
        for split in ("valid", "test"):
            if not len(sequences.positions(split)):
                raise DataError(self.folder.interactions, f"has no {split} event", "no user has three events",
                                f"{self.folder.make_command} --min_user_interactions 3")

    def _test(self, model: AbstractRecommender, sequences: Sequences) -> Predictions:
        """The one place where test events are read."""
        with Progress(f"test {self.config.name}", len(sequences.positions("test")), "users") as progress:
            return predict(model, sequences, "test", self.config.training_params, progress)

    def _write_predictions(self, predictions: Predictions, sequences: Sequences) -> None:
        """predictions.jsonl, in raw ids, for outside tools."""
        raw_item, raw_user = load_items(self.folder)["raw_id"], load_users(self.folder)["raw_id"]
        users = raw_user[sequences.user[predictions.positions]]
        lines = []
        for user, target, items, scores in zip(users, raw_item[predictions.targets], predictions.items,
                                               predictions.scores, strict=True):
            found = items >= 0
            lines.append(json.dumps({"user": user, "target": target, "items": list(raw_item[items[found]]),
                                     "scores": np.round(scores[found].astype(float), 6).tolist()}, ensure_ascii=False))
        write_text(self.run.folder / "predictions.jsonl", "\n".join(lines) + "\n")
