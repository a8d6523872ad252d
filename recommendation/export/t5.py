"""Export of a trained encoder-decoder in the format of transformers' T5, and import from this format."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from common.artifacts import DatasetFolder, load_items
from common.config import Config
from common.errors import ConfigError, DataError
from common.publishing import file_sha256, publish_folder
from common.reading import read_record

if TYPE_CHECKING:
    from recommendation.inputs import Choice  # for type checks only, because loading torch is slow

log = logging.getLogger(__name__)

MODEL = "encoder_decoder"
WEIGHTS = ("config.json", "model.safetensors")
FILES = (*WEIGHTS, "generation_config.json", "index.json", "README.md")

NOT_THE_SAME = ("The exported model was trained with a causal encoder and a bias in the cross-attention (train_on: "
                "every_position). T5 in transformers has neither, so T5 computes different scores. To get the same "
                "scores, train the model with --train_on target.")
WITHOUT_PRIOR = ("The run recommends with the prior {}, which is not part of the exported model. The exported model "
                 "has the metrics of the model alone.")
README = Path(__file__).with_name("t5_readme.md")
NUM_SHOWN = 10  # number of items that the program in the README shows


def check_t5_flags(config: Config, export_to: Path | None, from_t5: Path | None, force: bool) -> None:
    """Raise ConfigError if --export_t5 or --from_t5 does not work with the model, or if the target folder exists.

    With `force`, the target folder may exist if it contains only an earlier export.
    """
    for flag, value in (("export_t5", export_to), ("from_t5", from_t5)):
        if value is not None and config.name != MODEL:
            raise ConfigError(f"--{flag}", f"does not work with the model {config.name!r}",
                              f"Only {MODEL!r} has the layers of T5", f"use --model {MODEL}")
    if from_t5 is not None:
        _require_code_positions("--from_t5", config)
    if export_to is not None:
        _require_free(export_to.resolve(), force)


def _require_code_positions(where: str, config: Config) -> None:
    """Raise ConfigError if the encoder has one position per item."""
    if config.for_model()[MODEL]["model_params"]["encoder_positions"] != "code":
        raise ConfigError(where, "does not work with encoder_positions: item", "A T5 reads one position per code",
                          "train the model with --encoder_positions code")


def export_t5(folder: DatasetFolder, choice: Choice, run_root: Path, target: Path, run_id: str | None = None) -> None:
    """Write the model of a finished run to the folder `target`, in the format of transformers' T5.

    run_id: id of the run; None for the newest finished run

    Raises ConfigError if the encoder of the model has one position per item. If an error occurs, the folder is not
    changed.
    """
    from common.checkpoint import system_errors
    from recommendation.models.encoder_decoder.model import EncoderDecoder
    from recommendation.models.encoder_decoder.t5 import quiet, to_t5
    from recommendation.runs import load_recommender

    target = target.resolve()
    finished = load_recommender(folder, run_root, choice, "cpu", run_id)
    model, run = finished.model, finished.folder
    assert isinstance(model, EncoderDecoder)
    _require_code_positions(f"--export_t5: {run}", finished.config)

    quiet()
    index = dict(zip(load_items(folder)["raw_id"], model.tokens.T[:-1].tolist(), strict=True))
    prior = finished.config.training_params["prior"]
    notes = [NOT_THE_SAME] * (model.memory_bias is not None) + [WITHOUT_PRIOR.format(prior)] * (prior != "none")
    readme = README.read_text(encoding="utf-8").format(
        name=MODEL, dataset=folder.name, run=run.name, train_on=model.train_on, num_shown=NUM_SHOWN,
        num_beams=max(model.num_beams, NUM_SHOWN),
        note="".join(f"\n**{note}**\n" for note in notes),
        mask=model.properties()["encoder_mask"], max_history=model.config[MODEL]["training_params"]["max_history"])

    def write(staged: Path) -> None:
        with system_errors(target):
            to_t5(model).save_pretrained(staged)
        (staged / "index.json").write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")
        (staged / "README.md").write_text(readme, encoding="utf-8")

    publish_folder(target, write)
    log.info("recommendation: wrote run %s as a T5 model to %s (train_on: %s, encoder mask: %s)", run.name, target,
             model.train_on, model.properties()["encoder_mask"])
    for note in notes:
        log.info("recommendation: %s", note)


def t5_inputs(source: Path, command: str) -> dict[str, str]:
    """Return the sha256 of each weight file in the folder `source`. Raises DataError if a file is missing.

    command: the command that trains the model, for the error message
    """
    for name in WEIGHTS:
        if not (source / name).is_file():
            raise DataError(source / name, "not found", "--from_t5 needs a folder with " + " and ".join(WEIGHTS),
                            f"export a trained model with: {command} --export_t5 <folder>")
    return {f"from_t5/{name}": file_sha256(source / name) for name in WEIGHTS}


def initialize_from_t5(model, folder: DatasetFolder, source: Path) -> None:
    """Load the T5 weights in the folder `source` into the model.

    Logs a warning if the semantic IDs in index.json differ from those of the dataset. Raises ConfigError if the folder
    contains another kind of model, or a T5 whose sizes or layers differ from the model's. Raises ArtifactError if a
    file is damaged.
    """
    from recommendation.models.encoder_decoder.t5 import load_t5, read_t5

    load_t5(model, read_t5(source))
    log.info("recommendation: initialized the model from the T5 in %s", source)
    if not (source / "index.json").is_file():
        return
    fix = "use the index.json that --export_t5 wrote, or delete this file"
    index = read_record(source / "index.json", fix, {})
    ours = dict(zip(load_items(folder)["raw_id"], model.tokens.T[:-1].tolist(), strict=True))
    common = [item for item in ours if item in index]
    num_changed = sum(ours[item] != index[item] for item in common)
    if num_changed or not common:
        log.warning("%s: only %d of the %d items of the dataset have the same semantic ID in this file",
                    source / "index.json", len(common) - num_changed, len(ours))


def _require_free(target: Path, force: bool) -> None:
    """Raise ConfigError if `target` exists, unless it is an earlier export and `force` is set."""
    if not target.exists():
        return
    if not force:
        raise ConfigError(f"--export_t5 {target}", "already exists",
                          fix="use --force to replace it, or choose another folder")
    files = {path.name: path for path in target.iterdir()} if target.is_dir() else {"a file": target}
    others = sorted(name for name, path in files.items()
                    if name not in FILES or path.is_symlink() or not path.is_file())
    if files and not others:  # a T5 model of the Hugging Face hub has no index.json, and another README.md
        others = [] if "index.json" in files and _is_our_readme(target / "README.md") else [
            "no index.json and README.md of an export"]
    if others:
        raise ConfigError(f"--export_t5 {target}", f"is not an export of a T5 model: found {others[0]}",
                          "--force would delete the whole folder", "choose another folder")


def _is_our_readme(path: Path) -> bool:
    """Return whether an export of a T5 model has written this README.md."""
    return path.exists() and path.read_text(encoding="utf-8", errors="replace").startswith(f"# {MODEL} for ")
