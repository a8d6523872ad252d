"""Runs: what identifies one, what it reads, which one to load, and whether it still fits its data set."""

import logging
import shlex
from operator import eq
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from common.artifacts import DatasetFolder, load_codes, load_meta, variant
from common.checkpoint import Checkpoints, restore
from common.cli import ROOT
from common.config import Config, resolve
from common.device import resolve_device
from common.errors import ArtifactError, ConfigError, DataError, closest, nearest
from common.run import latest_run, read_finished, read_json
from recommendation.models import DEFAULTS, code_of, find_class
from recommendation.models.abstract_model import AbstractRecommender, Catalogue

log = logging.getLogger(__name__)

NO_CODES = "no-codes"  # the variant's name where a model reads no semantic IDs
FLAGS = {"quantizer_name": "rqvae", "embedding_suffix": "td", "tag": None}  # which semantic IDs, and the defaults


class Choice(NamedTuple):
    """A recommender, and whose semantic IDs it reads."""

    model: str
    quantizer: str = "rqvae"
    suffix: str = "td"
    tag: str | None = None

    @property
    def needs_codes(self) -> bool:
        return find_class(self.model).needs_codes

    def runs(self, run_root: Path, dataset: str) -> Path:
        """The folder of its runs on a data set."""
        of_codes = variant(self.quantizer, self.suffix, self.tag) if self.needs_codes else NO_CODES
        return run_root / "recommendation" / dataset / self.model / of_codes

    def training_command(self, folder: DatasetFolder, run_root: Path) -> str:
        """The command that trains it, with the flags that are not at their default."""
        flags = [f"--{name} {value}" for (name, default), value in zip(FLAGS.items(), self[1:], strict=True)
                 if value != default and self.needs_codes]
        root = [] if run_root.resolve() == ROOT / "runs" else [f"--run_root {shlex.quote(str(run_root))}"]
        return " ".join(["python recommendation/main.py", f"--model={self.model}", f"--category={folder.name}", *flags,
                         *root]) + folder.root_flag

    def flags_of(self, name: str) -> str:
        """The flags that name the semantic IDs of the variant `name` (`rqvae-td-small`) in place of these."""
        words = name.split("-")
        parts = [[words[:i], words[i:j], words[j:]] for i in range(1, len(words)) for j in range(i + 1, len(words) + 1)]
        others = [tuple("-".join(part) or None for part in of_one) for of_one in parts]
        other = max(others, key=lambda values: sum(map(eq, values, self[1:])))  # names may contain the dash
        return " ".join(f"--{flag} {value}" if value else f"without --{flag}"
                        for flag, value, own in zip(FLAGS, other, self[1:], strict=True) if value != own)


class Source(NamedTuple):
    """The catalogue as the artifacts have it."""

    catalogue: Catalogue
    inputs: dict[str, str]        # file name -> sha256
    collisions: dict[str, float]  # rates before and after disambiguation; empty without semantic IDs


def load_source(folder: DatasetFolder, choice: Choice) -> Source:
    """Raises DataError or ArtifactError where interactions, items or semantic IDs are missing or stale."""
    inputs = {folder.interactions.name: load_meta(folder.interactions, folder.make_command)["sha256"]}
    if not choice.needs_codes:
        num_items = load_meta(folder.items, folder.make_command)["num_items"]
        return Source(Catalogue(num_items, None, []), inputs, {})
    codes, meta = load_codes(folder, *choice[1:])
    path = folder.codes(*choice[1:])
    inputs[path.name] = meta["sha256"]
    if meta.get("collapse"):
        num_distinct = round((1 - meta["collision_rate_before"]) * len(codes))
        log.warning("recommendation: WARNING: %s: %d items have only %d distinct IDs before disambiguation: %s. "
                    "They were made by: %s", path.name, len(codes), num_distinct, meta["collapse"], meta["command"])
    return Source(Catalogue(len(codes), torch.from_numpy(codes).long(), meta["codebook_sizes"]), inputs,
                  {key: meta[key] for key in ("collision_rate_before", "collision_rate_after")})


class FinishedRun(NamedTuple):
    """What is known of one run."""

    model: str
    variant: str   # whose codes, or no-codes
    config: dict
    inputs: dict
    metrics: dict
    seconds: float
    users_per_second: float | None
    has_current_codes: bool = True  # whether the semantic IDs that it has read are those on the disk, if it reads any

    @property
    def seed(self) -> int:
        return self.config["common"]["seed"]

    @property
    def filter_seen(self) -> bool:
        """Whether items of the history were left out."""
        return self.config[self.model]["training_params"]["filter_seen"]


def read_run(folder: Path) -> FinishedRun:
    """A run folder's files. Raises ArtifactError for one that cannot be read."""
    fix = f"delete {folder}, and run the model again"
    finished = read_finished(folder, fix)
    fix, model, times = f"{finished['command']} --force", folder.parent.parent.name, folder / "times.json"
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config["common"]["seed"], config[model]["training_params"]["filter_seen"]  # what is read of it below
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ArtifactError(folder / "config.yaml", "cannot be read", str(error), fix) from error
    return FinishedRun(model, folder.parent.name, config, finished["inputs"],
                       read_json(folder / "metrics.json", fix, "test", "num_parameters"),
                       read_json(times, fix, "training")["training"] if times.exists() else float("nan"),
                       finished.get("users_per_second"))


class LoadedRun(NamedTuple):
    """A finished run, ready to recommend."""

    model: AbstractRecommender  # in evaluation, on its device
    config: Config
    inputs: dict[str, str]      # file name -> sha256, what it was trained on
    folder: Path
    device: torch.device


def load_recommender(folder: DatasetFolder, run_root: Path, choice: Choice, device: str | None = None) -> LoadedRun:
    """The newest finished run of a recommender; `device` in place of its configuration's.

    Raises DataError where there is none, and ArtifactError where interactions or semantic IDs have changed since it
    was trained, or where its configuration or checkpoint is of another version of the model.
    """
    run, command = newest_run(folder, run_root, choice), choice.training_command(folder, run_root)
    summary = read_finished(run, f"{command} --force")
    command, source = summary["command"], load_source(folder, choice)
    if summary.get("code") != code_of(choice.model):
        log.warning("recommendation: %s was trained by other code: its model, the files that the model imports, or the "
                    "trainer have changed since", run)
    require_same_inputs(run, summary["inputs"], source.inputs, command)
    config, model = _build(run, choice.model, source, f"{command} --force")
    checkpoints = Checkpoints(run / "checkpoints", command)
    restore(model, checkpoints.load_best().get("model", {}), checkpoints.best, f"{command} --force")
    on = resolve_device(device or config["common"]["device"], "--device" if device else config.origins["common.device"])
    return LoadedRun(model.to(on).eval(), config, source.inputs, run, on)


def newest_run(folder: DatasetFolder, run_root: Path, choice: Choice) -> Path:
    """The folder of the newest finished run. Raises DataError, naming the nearest other choice, where there is none."""
    parent = choice.runs(run_root, folder.name)
    run = latest_run(parent)
    if run is None:
        others = sorted({path.parent.parent.name for path in parent.parent.glob("*/*/finished.json")})
        close, command = closest(parent.name, others), choice.training_command(folder, run_root)
        raise DataError(parent, "has no finished run", nearest(parent.name, others) if others else "",
                        f"{choice.flags_of(close)}; or to train it: {command}" if close else command)
    return run


def require_same_inputs(run: Path, recorded: dict[str, str], there: dict[str, str], command: str) -> None:
    """Raise ArtifactError where a run has read something else than what is `there` now."""
    for name, sha256 in there.items():
        if recorded.get(name) != sha256:
            raise ArtifactError(run, f"was trained on another {name}",
                                f"its sha256 was {str(recorded.get(name))[:12]} and is {sha256[:12]} now", command)


def _build(run: Path, name: str, source: Source, fix: str) -> tuple[Config, AbstractRecommender]:
    """The run's configuration and the model that it describes, with no weights as yet."""
    try:
        config = resolve(name, run / "config.yaml", DEFAULTS, [])
        model_config = config.for_model()
        model = find_class(name)(model_config, source.catalogue)
        config.check_all_read(model_config)
    except ConfigError as error:  # nobody mends a run's own file: the run is what has to be made again
        raise ArtifactError(error.where, error.what, f"{error.why} (the run is of another version of {name})".strip(),
                            fix) from error
    return config, model
