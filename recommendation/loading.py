"""A finished run's recommender, as it was selected; refused where it no longer fits what lies there."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from common.artifacts import DatasetFolder
from common.checkpoint import Checkpoints, restore
from common.config import Config, resolve
from common.device import resolve_device
from common.errors import ArtifactError, ConfigError, DataError, closest, nearest
from common.run import latest_run, read_json
from recommendation.models import DEFAULTS, code_of, find_class
from recommendation.models.abstract_model import AbstractRecommender
from recommendation.runs import Choice, Source, load_source

log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """A finished run, ready to recommend."""

    model: AbstractRecommender  # in evaluation, on its device
    config: Config
    inputs: dict[str, str]      # file name -> sha256, what it was trained on
    folder: Path
    device: torch.device


def load_recommender(folder: DatasetFolder, run_root: Path, choice: Choice, device: str | None = None) -> Finished:
    """The newest finished run of a recommender; `device` in place of its configuration's.

    Raises DataError where there is none, and ArtifactError where interactions or semantic IDs have changed since it
    was trained, or where its configuration or checkpoint is of another version of the model.
    """
    run, command = newest_run(folder, run_root, choice), choice.training_command(folder, run_root)
    summary = read_json(run / "finished.json", f"{command} --force", "inputs", "command")
    command, source = summary["command"], load_source(folder, choice)
    if summary.get("code") != code_of(choice.model):
        log.warning("recommendation: %s was trained by other code: its model, the files that the model imports, or the "
                    "trainer have changed since", run)
    require_same_inputs(run, summary["inputs"], source.inputs, command)
    config, model = _build(run, choice.model, source, f"{command} --force")
    checkpoints = Checkpoints(run / "checkpoints", command)
    restore(model, checkpoints.load_best().get("model", {}), checkpoints.best, f"{command} --force")
    on = resolve_device(device or config["common"]["device"], "--device" if device else config.origins["common.device"])
    return Finished(model.to(on).eval(), config, source.inputs, run, on)


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
