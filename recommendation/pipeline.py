"""The pipeline of the recommendation stage."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.artifacts import DatasetFolder, load_items, load_meta, load_users
from common.checkpoint import Checkpoints
from common.config import Config
from common.device import resolve_device
from common.distributed import all_reduce_max, is_main, process_group
from common.errors import DataError, UserError
from common.publishing import write_text
from common.run import Run, end_log
from recommendation.dataset import Sequences
from recommendation.evaluator import Predictions, cannot_rank, evaluate, selecting_protocol
from recommendation.export.t5 import initialize_from_t5, t5_inputs
from recommendation.inputs import Choice, load_neighbours, load_source, neighbour_sources
from recommendation.metrics import PROTOCOLS, mean_over_runs
from recommendation.models import code_of, find_class, make_baseline
from recommendation.models.abstract_model import AbstractRecommender, Teacher
from recommendation.prior_weight import choose_weights
from recommendation.runs import RANKS, load_baseline, read_metrics
from recommendation.trainer import train

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """The results of a recommender."""

    metrics: dict[str, dict[str, dict]]  # split -> protocol -> metrics
    test: dict[str, Predictions]         # protocol -> test predictions


class Pipeline:
    """Load the inputs, train and test a recommender, and write the results to a run folder."""

    def __init__(self, config: Config, folder: DatasetFolder, choice: Choice, run_root: Path, command: str,
                 from_t5: Path | None = None):
        end_log()
        self.config, self.folder, self.from_t5 = config, folder, from_t5
        self.device = resolve_device(config["common"]["device"], config.origins["common.device"])
        self.model_class = find_class(config.name)
        self.neighbour_sources = neighbour_sources(config, folder)
        self.catalogue, inputs, self.collisions = load_source(folder, choice, self.neighbour_sources)
        if from_t5 is not None:
            inputs |= t5_inputs(from_t5, choice.training_command(folder, run_root))
        self.run = Run(choice.runs(run_root, folder.name), config.values, inputs, command,
                       code_of(config.name, *(config.training_params[role] for role in ("prior", "teacher"))))

    def execute(self, force: bool) -> dict:
        """Train and test the model, and return the content of metrics.json.

        If the run is already finished, only read its metrics.json, unless `force` is set.
        """
        if self.run.finished and not force:
            log.info("recommendation: reusing run %s of %s (it is finished; use --force to repeat it)",
                     self.run.id, self.config.name)
            self.run.make_latest()
            return read_metrics(self.run.folder, f"{self.run.command} --force")
        if self.neighbour_sources:
            self.catalogue = self.catalogue._replace(
                neighbours={source: load_neighbours(self.folder, source) for source in self.neighbour_sources})
        model = self._build()
        sequences = Sequences.load(self.folder, self.device)
        self._require_held_out(sequences)
        with process_group(self.device), self.run.open(force):
            prior = self._baseline("prior", sequences)  # a count that is not possible must not fail after the training
            with self.run.clock("training"):
                best = train(model, sequences, self.config, self.run, self._make_teacher(sequences))
            rankers = self._rankers(model, prior, sequences)
            results = self._evaluate(rankers, sequences)
            self._write(results, {
                "protocol": selecting_protocol(sequences, self.config.training_params), "best_epoch": best.epoch,
                **({"weights": rankers["both"].weights} if "both" in rankers else {}),
                "num_parameters": sum(p.numel() for p in model.parameters()), **model.properties(), **self.collisions})
            self._write_predictions(list(results.values())[-1].test, sequences)
            self._warn(model, results, selecting_protocol(sequences, self.config.training_params))
            num_lists = sum(found["num_targets"] for found in results["alone"].metrics["test"].values())
            self.run.finish({"model": self.config.name, "dataset": self.folder.name,
                             "users_per_second": num_lists / self.run.seconds("test")})
        return read_metrics(self.run.folder, f"{self.run.command} --force")

    def _write(self, results: dict[str, Evaluation], properties: dict) -> None:
        """Write metrics.json, with the properties of the run, and ranks.json."""
        metrics = {name: of_ranker.metrics for name, of_ranker in results.items()}
        ranks = {name: {protocol: found.ranks().tolist() for protocol, found in of_ranker.test.items()}
                 for name, of_ranker in results.items()}
        write_text(self.run.folder / "metrics.json", json.dumps(metrics | properties, indent=2) + "\n")
        write_text(self.run.folder / RANKS, json.dumps(ranks) + "\n")

    def _rankers(self, model: AbstractRecommender, prior: Any, sequences: Sequences) -> dict[str, Any]:
        """Return the recommenders to evaluate: the model alone, and, if there is a prior, the prior and both."""
        if prior is None:
            return {"alone": model}
        with self.run.clock("weight of the prior", repeated=True):
            both = choose_weights(model, prior.log_probabilities, sequences, self.config.training_params)
        return {"alone": model, "prior": prior, "both": both}

    def _make_teacher(self, sequences: Sequences) -> Teacher | None:
        """Return the teacher of the training, or None."""
        params = self.config.training_params
        baseline = self._baseline("teacher", sequences)
        if baseline is None or not params["teacher_weight"]:
            return None
        return baseline.teacher(sequences.training_events(), params["teacher_weight"],
                                PROTOCOLS[selecting_protocol(sequences, params)], params["teacher_temperature"])

    def _baseline(self, role: str, sequences: Sequences) -> Any:
        """Return the baseline that the key `role` (prior or teacher) names, fitted to the training events, or None."""
        name, checkpoints = self.config.training_params[role], Checkpoints(self.run.checkpoints, self.run.command)
        if name == "none":
            return None
        # Several processes must agree: if one reads the file and another one fits, they wait for each other.
        [is_known] = all_reduce_max(is_main() and checkpoints.path_of(name).exists())
        if is_known:
            try:
                return load_baseline(name, self.catalogue, checkpoints).to(self.device)
            except UserError as error:
                log.warning("fitting %s again: %s", name, error)
        baseline = make_baseline(name, self.catalogue).to(self.device)
        baseline.fit(sequences.training_sequences(), sequences.validation_events())
        checkpoints.save_named(name, {"model": baseline.state_dict()})
        # All processes use the counts of the first one.
        return baseline.eval() if is_main() else load_baseline(name, self.catalogue, checkpoints).to(self.device)

    def _evaluate(self, rankers: dict[str, AbstractRecommender], sequences: Sequences) -> dict[str, Evaluation]:
        """Evaluate each recommender on both splits, with both protocols."""
        params, results = self.config.training_params, {}
        for name, ranker in rankers.items():
            results[name] = Evaluation({"valid": {}, "test": {}}, {})
            for split in ("valid", "test"):
                part = "test" if (name, split) == ("alone", "test") else "evaluation"
                with self.run.clock(part, repeated=True):
                    for protocol in PROTOCOLS:
                        label = self.config.name + ("" if name == "alone" else f" ({name})")
                        found, measured = evaluate(ranker, sequences, split, params, protocol,
                                                   f"{split} {label}, {protocol} items")
                        results[name].metrics[split][protocol] = measured
                        if split == "test":
                            results[name].test[protocol] = found
        return results

    def _warn(self, model: AbstractRecommender, results: dict[str, Evaluation], protocol: str) -> None:
        """Warn about lists that have no order or empty positions, and about test events without a history."""
        alone, test = results["alone"].test[protocol], list(results.values())[-1].metrics["test"][protocol]
        if warning := cannot_rank(model, alone.items, alone.scores):  # with a prior, the lists always have an order
            log.warning("%s", warning)
        if test["num_without_history"]:
            log.warning("recommendation: %d test events are skipped, because their users have no earlier event",
                        test["num_without_history"])
        if test["missing_share"]:
            log.warning("recommendation: %.2f%% of the positions in the recommended lists are empty. The "
                        "catalogue has %d items, and a list has %d positions%s", 100 * test["missing_share"],
                        self.catalogue.num_items, self.config.training_params["top_k"],
                        " and excludes the items of the history" if PROTOCOLS[protocol] else "")

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
            if len(sequences.positions(split)):
                continue
            why, fix = "No user has three events", f"{self.folder.make_command} --min_user_interactions 3"
            if load_meta(self.folder.interactions, self.folder.make_command).get("split_name") == "temporal":
                why = f"It has {sequences.num_without_history(split):,} events, of users without an earlier event"
                fix = f"{self.folder.make_command} with other --split_ratios or --split_dates"
            raise DataError(self.folder.interactions, f"has no event with a history in the {split} split", why, fix)

    def _write_predictions(self, predictions: dict[str, Predictions], sequences: Sequences) -> None:
        """Write the test predictions to predictions.jsonl, with the raw ids of users and items.

        predictions: protocol -> predictions
        """
        raw_item, raw_user = load_items(self.folder)["raw_id"], load_users(self.folder)["raw_id"]
        every = predictions["all"]
        lines = []
        for row, (position, target) in enumerate(zip(every.positions, every.targets, strict=True)):
            line = {"user": raw_user[sequences.user[position]], "target": raw_item[target]}
            for protocol, keys in (("all", ("items", "scores")), ("unseen", ("unseen", "unseen_scores"))):
                items, scores = predictions[protocol].items[row], predictions[protocol].scores[row]
                found = items >= 0
                line |= dict(zip(keys, (list(raw_item[items[found]]),
                                        np.round(scores[found].astype(float), 6).tolist()), strict=True))
            lines.append(json.dumps(line, ensure_ascii=False))
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
    summary = {"seeds": seeds, "runs": list(runs), "protocol": next(iter(runs.values()))["protocol"],
               **mean_over_runs(list(runs.values()))}
    write_text(pipeline.run.parent / "seeds.json", json.dumps(summary, indent=2) + "\n")
    return summary
