"""Finished runs of recommenders: find them, load them, and check that their inputs have not changed."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from common.artifacts import DatasetFolder, load_meta
from common.checkpoint import Checkpoints
from common.config import Config, resolve
from common.device import resolve_device
from common.errors import ArtifactError, ConfigError, DataError, closest, nearest
from common.reading import AMOUNT, COUNT, SHARE, WHY, Record, read_record, shortened
from common.run import latest_run, read_config, read_finished
from recommendation.inputs import NO_CODES, TFIDF, Choice, Source, content_inputs, load_source
from recommendation.metrics import METRICS, PROTOCOLS, RANKERS, SORTED_BY
from recommendation.models import DEFAULTS, code_of, find_class, make_baseline, names
from recommendation.models.abstract_model import AbstractRecommender, Catalogue
from recommendation.models.with_prior import WEIGHTS, WithPrior

log = logging.getLogger(__name__)

RANKS = "ranks.json"
BY_POPULARITY = "by_popularity"  # the only metric that is not a number


class FinishedRun(NamedTuple):
    """The configuration and the results of a finished run."""

    folder: Path
    model: str
    variant: str   # variant of the semantic IDs, or no-codes
    config: dict
    inputs: dict
    code: str      # digest of the training code
    metrics: Record
    command: str   # the command that trained the model
    seconds: float  # training time; NaN if it was not recorded
    users_per_second: float | None
    changed: Sequence[str] = ()  # what has changed in the dataset since the run: codes, texts, embedding
    ranks: dict[str, dict[str, np.ndarray]] | None = None  # the result of `read_ranks`; None if it was not read

    @property
    def seed(self) -> int:
        return self.config["common"]["seed"]

    @property
    def rankers(self) -> list[str]:
        """What was evaluated: the model `alone`, and with a prior also the `prior` alone and `both` together."""
        return [name for name in RANKERS if name in self.metrics]

    @property
    def prior(self) -> str:
        """The name of the prior, or `none`."""
        return self.config[self.model]["training_params"]["prior"]

    @property
    def neighbour_sources(self) -> list[str]:
        """The sources of neighbours, as in `neighbour_sources`."""
        suffixes = [name.partition(".emb-")[2].removesuffix(".npy") for name in self.inputs if ".emb-" in name]
        return [TFIDF] * ("items.parquet" in self.inputs) + suffixes

    def has_current_code(self) -> bool:
        """Return whether the code that trained the run is the current code."""
        params = self.config[self.model]["training_params"]
        return self.model in names() and self.code == code_of(self.model, params["prior"], params["teacher"])

    @property
    def protocol(self) -> str:
        """The protocol that selected the checkpoint, and that users get."""
        return self.metrics["protocol"]


def read_run(folder: Path) -> FinishedRun:
    """Read the configuration and the results of a finished run. Raises ArtifactError if a file cannot be read."""
    fix = f"delete {folder} and train the model again"
    finished = read_finished(folder, fix)
    fix, model, times = finished.fix, folder.parent.parent.name, folder / "times.json"
    config = read_config(folder, fix)
    params = config[model].get("training_params") if isinstance(config.get(model), dict) else None
    if not isinstance(params, dict) or not all(isinstance(params.get(role), str) for role in ("prior", "teacher")):
        raise ArtifactError(folder / "config.yaml", f"{model}.training_params must have the keys prior and teacher",
                            WHY, fix)
    return FinishedRun(folder, model, folder.parent.name, config, finished["inputs"], finished.get("code", ""),
                       read_metrics(folder, fix), finished["command"],
                       read_record(times, fix, {"training": AMOUNT})["training"] if times.exists() else float("nan"),
                       finished.get("users_per_second"))


def read_metrics(folder: Path, fix: str) -> Record:
    """Read `metrics.json` of a finished run. Raises ArtifactError if the file is damaged."""
    metrics = read_record(folder / "metrics.json", fix, {"alone": dict, "num_parameters": COUNT, "protocol": str}, {
        "prior": dict, "both": dict, "weights": dict[str, AMOUNT]})
    if metrics["protocol"] not in PROTOCOLS:
        raise ArtifactError(metrics.path, f"has an unknown protocol {shortened(metrics['protocol'])!r}", WHY, fix)
    for ranker in (name for name in RANKERS if name in metrics):
        for split in ("valid", "test"):
            for protocol in PROTOCOLS:
                _check_metrics(metrics, f"{ranker}.{split}.{protocol}")
    return metrics


def _check_metrics(metrics: Record, place: str) -> None:
    """Raise ArtifactError if the metrics at `place`, a dotted path in metrics.json, are missing or wrong."""
    found: Any = metrics
    for key in place.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise ArtifactError(metrics.path, f"{place} must be of type dict", WHY, metrics.fix)
    kinds = {f"{place}.{name}": _kind(name) for name in found if name != BY_POPULARITY}
    Record({f"{place}.{name}": value for name, value in found.items()}, metrics.path, metrics.fix).check(
        {**kinds, f"{place}.num_targets": COUNT, f"{place}.{SORTED_BY}": _kind(SORTED_BY)}, {})


def read_ranks(folder: Path, metrics: Record, fix: str) -> dict[str, dict[str, np.ndarray]]:
    """Read `ranks.json`: ranker -> protocol -> rank of each test target, 0 if it is not in the list.

    metrics: the content of metrics.json

    Raises ArtifactError if the file is damaged.
    """
    rankers = [name for name in RANKERS if name in metrics]
    record = read_record(folder / RANKS, fix, dict.fromkeys(rankers, dict[str, list[COUNT]]))
    for ranker in rankers:
        for protocol in PROTOCOLS:
            if len(record[ranker].get(protocol, [])) != metrics[ranker]["test"][protocol]["num_targets"]:
                raise ArtifactError(record.path, f"must have one rank per test target in {ranker}.{protocol}", WHY, fix)
    return {ranker: {protocol: np.array(record[ranker][protocol]) for protocol in PROTOCOLS} for ranker in rankers}


def _kind(name: str) -> Any:
    """Return the type of an entry of metrics.json, for `fits`."""
    if (metric := METRICS.get(name.partition("@")[0])) and not name.endswith("_stderr"):
        return Annotated[float, *metric.bounds]
    ends = {"_stderr": AMOUNT, "_share": SHARE}
    return COUNT if name.startswith("num_") else next((ends[end] for end in ends if name.endswith(end)), float)


def current_inputs(folder: DatasetFolder, run: FinishedRun) -> dict[str, str]:
    """Return the sha256 of each file of the dataset that a run was trained on: file name -> sha256."""
    fix = f"python quantization/main.py --dataset_name {folder.name}, with the flags of {run.variant}"
    paths = {folder.interactions: folder.make_command}
    if run.variant != NO_CODES:
        paths[folder.path / f"{folder.name}.codes-{run.variant}.npy"] = fix
    current = {path.name: load_meta(path, command)["sha256"] for path, command in paths.items()}
    return current | content_inputs(folder, run.inputs)


class LoadedRun(NamedTuple):
    """A finished run with its trained model."""

    model: AbstractRecommender  # in evaluation mode, on `device`
    ranker: AbstractRecommender  # the model with its prior; without a prior, the model itself
    protocol: str               # whether users get all items or only unseen items
    config: Config
    inputs: dict[str, str]      # file name -> sha256, for the files that the model was trained on
    folder: Path
    device: torch.device


def load_recommender(folder: DatasetFolder, run_root: Path, choice: Choice, device: str | None = None,
                     run_id: str | None = None) -> LoadedRun:
    """Load the trained model of a finished run.

    device: device to compute on; None for the device in the run's configuration
    run_id: id of the run; None for the newest finished run

    Raises DataError if no such run exists. Raises ArtifactError if the interactions or semantic IDs have changed since
    the training, or if the configuration or the checkpoint does not fit the current code of the model.
    """
    run, command = find_run(folder, run_root, choice, run_id), choice.training_command(folder, run_root)
    summary = read_finished(run, f"{command} --force")
    command, source = summary["command"], load_source(folder, choice)
    # The neighbours are needed only for the training. The checkpoint has the weights that `fit` has computed from them.
    inputs = source.inputs | content_inputs(folder, summary["inputs"])
    require_same_inputs(run, summary["inputs"], inputs, command)
    config, model, on = _build(run, choice.model, source, f"{command} --force", device)
    params = config.training_params
    if summary.get("code") != code_of(choice.model, params["prior"], params["teacher"]):
        log.warning("recommendation: %s was trained with another version of the code: the code of the model or of "
                    "the trainer has changed", run)
    checkpoints = Checkpoints(run / "checkpoints", command)
    state = checkpoints.load_best(model)
    if problem := model.find_problem():
        raise ArtifactError(state.path, problem, WHY, state.fix)
    model = model.to(on).eval()
    metrics = read_metrics(run, f"{command} --force")
    if ("both" in metrics) != (params["prior"] != "none"):
        raise ArtifactError(metrics.path, f"does not fit the prior {params['prior']!r} in config.yaml", WHY,
                            metrics.fix)
    ranker = _with_prior(model, config, metrics, checkpoints, source) if "both" in metrics else model
    return LoadedRun(model, ranker, metrics["protocol"], config, inputs, run, on)


def _with_prior(model: AbstractRecommender, config: Config, metrics: Record, checkpoints: Checkpoints,
                source: Source) -> WithPrior:
    """Return the model with the prior of its run."""
    prior = load_baseline(config.training_params["prior"], source.catalogue, checkpoints)
    weights = metrics.get("weights", {})
    if weights.keys() != PROTOCOLS.keys() or max(weights.values()) > max(WEIGHTS):
        raise ArtifactError(metrics.path, f"weights must have a weight of at most {max(WEIGHTS):g} for each protocol",
                            WHY, metrics.fix)
    device = next(model.buffers(), next(model.parameters())).device
    return WithPrior(model, prior.to(device).log_probabilities, metrics["weights"])


def load_baseline(name: str, catalogue: Catalogue, checkpoints: Checkpoints) -> Any:
    """Load a fitted baseline that belongs to a run, its prior or its teacher. Raises ArtifactError if it is damaged."""
    baseline = make_baseline(name, catalogue)
    state = checkpoints.load_named(name, baseline)
    if problem := baseline.find_problem():
        raise ArtifactError(state.path, problem, WHY, state.fix)
    return baseline.eval()


def find_run(folder: DatasetFolder, run_root: Path, choice: Choice, run_id: str | None = None) -> Path:
    """Return the folder of the finished run `run_id`, or of the newest finished run if `run_id` is None.

    Raises DataError if no such run exists.
    """
    parent = choice.runs(run_root, folder.name)
    run = latest_run(parent)
    if run is not None and run_id is not None:
        finished = sorted(path.parent.name for path in parent.glob("*/finished.json"))
        if run_id not in finished:
            raise DataError(f"--run {run_id}", f"is not a finished run in {parent}", nearest(run_id, finished),
                            f"use --run {closest(run_id, finished) or finished[0]}, or leave out --run to use the "
                            "newest finished run")
        return parent / run_id
    if run is None:
        command = choice.training_command(folder, run_root)
        others = sorted({path.parent.parent.name for path in parent.parent.glob("*/*/finished.json")})
        if close := closest(parent.name, others):
            raise DataError(parent, "has no finished run", nearest(parent.name, others),
                            f"correct the flags ({choice.flags_of(close)}), or train the model with: {command}")
        trained = sorted({path.parts[-4:-2] for path in parent.parent.parent.glob("*/*/*/finished.json")})
        flags = [f"--model {name}" if ids == NO_CODES else f"--model {name} {Choice(name).flags_of(ids)}".strip()
                 for name, ids in trained]
        why = f"The flags of the models that have finished runs are: {'; '.join(flags)}" if flags else ""
        raise DataError(parent, "has no finished run", why, command)
    return run


def require_same_inputs(run: Path, recorded: dict[str, str], current: dict[str, str], command: str) -> None:
    """Raise ArtifactError if an input file has changed since the run was trained.

    recorded, current: file name -> sha256, at the training and now
    command: the command that trains the model again
    """
    for name, sha256 in current.items():
        if recorded.get(name) != sha256:
            raise ArtifactError(run, f"is stale: {name} has changed since the training",
                                f"The sha256 was {str(recorded.get(name))[:12]} and is now {sha256[:12]}", command)


def _build(run: Path, name: str, source: Source, fix: str,
           device: str | None) -> tuple[Config, AbstractRecommender, torch.device]:
    """Return the run's configuration, an untrained model with this configuration, and the device for the model."""
    on = None if device is None else resolve_device(device, "--device")
    try:
        config = resolve(name, run / "config.yaml", DEFAULTS, [])
        on = on or resolve_device(config["common"]["device"], config.origins["common.device"])
        model_config = config.for_model()
        model = find_class(name)(model_config, source.catalogue)
        config.check_all_read(model_config)
    except ConfigError as error:  # not a mistake of the user, so the fix is to repeat the run
        raise ArtifactError(error.where, error.what,
                            f"The run was made with another version of {name}. {error.why}".strip(), fix) from error
    return config, model, on
