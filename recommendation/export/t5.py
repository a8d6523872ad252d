"""A trained encoder-decoder as a folder that transformers' T5 loads, and such a folder as the start of another one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from common.artifacts import DatasetFolder, load_items
from common.errors import ArtifactError, ConfigError, DataError
from common.publishing import file_sha256, publish_folder
from common.run import read_json

if TYPE_CHECKING:
    from recommendation.runs import Choice  # imports torch, which would delay an error in a flag

log = logging.getLogger(__name__)

MODEL = "encoder_decoder"
WEIGHTS = ("config.json", "model.safetensors")
FILES = (*WEIGHTS, "generation_config.json", "index.json", "README.md")

NOT_THE_SAME = ("transformers' encoder is not causal and its cross-attention has no bias. This model was trained with "
                "both (train_on: every_position), so that T5 will not give the same numbers; a model that is trained "
                "with --train_on target does.")
README = Path(__file__).with_name("t5_readme.md")


def check_t5_flags(model: str, export_to: Path | None, from_t5: Path | None, force: bool) -> None:
    """Refuse --export_t5 and --from_t5 where they cannot mean anything, before anything heavy is imported."""
    for flag, value in (("export_t5", export_to), ("from_t5", from_t5)):
        if value is not None and model != MODEL:
            raise ConfigError(f"--{flag}", f"the model is {model!r}", f"only {MODEL!r} has the layers of T5",
                              f"--model {MODEL}")
    if export_to is not None:
        _require_free(export_to.resolve(), force)


def export_t5(folder: DatasetFolder, choice: Choice, run_root: Path, target: Path) -> None:
    """Write the newest finished run's model into the folder `target`; all of it or nothing."""
    from recommendation.models.encoder_decoder.model import EncoderDecoder
    from recommendation.models.encoder_decoder.t5 import quiet, to_t5
    from recommendation.runs import load_recommender

    target = target.resolve()
    finished = load_recommender(folder, run_root, choice, "cpu")
    model, run = finished.model, finished.folder
    assert isinstance(model, EncoderDecoder)

    quiet()
    index = dict(zip(load_items(folder)["raw_id"], model.tokens[:-1].tolist(), strict=True))
    note = "" if model.memory_bias is None else f"\n**{NOT_THE_SAME}**\n"
    readme = README.read_text(encoding="utf-8").format(
        name=MODEL, dataset=folder.name, run=run.name, train_on=model.train_on, note=note,
        mask=model.properties()["encoder_mask"], max_history=model.config[MODEL]["training_params"]["max_history"])

    def write(staged: Path) -> None:
        to_t5(model).save_pretrained(staged)
        (staged / "index.json").write_text(json.dumps(index, ensure_ascii=False) + "\n", encoding="utf-8")
        (staged / "README.md").write_text(readme, encoding="utf-8")

    publish_folder(target, write)
    log.info("recommendation: wrote run %s as a T5 to %s (train_on: %s, encoder mask: %s)", run.name, target,
             model.train_on, model.properties()["encoder_mask"])
    if note:
        log.info("recommendation: %s", NOT_THE_SAME)


def t5_inputs(source: Path, command: str) -> dict[str, str]:
    """The sha256 of the files that a model is initialized from, as inputs of its run; `command` trains the model."""
    for name in WEIGHTS:
        if not (source / name).is_file():
            raise DataError(source / name, "not there", "--from_t5 takes a folder with " + " and ".join(WEIGHTS),
                            f"{command} --export_t5 <folder>")
    return {f"from_t5/{name}": file_sha256(source / name) for name in WEIGHTS}


def initialize_from_t5(model, folder: DatasetFolder, source: Path) -> None:
    """Give the built model the weights of the folder `source`; says so if the items had other IDs there."""
    from recommendation.models.encoder_decoder.t5 import load_t5, read_t5

    load_t5(model, read_t5(source))
    log.info("recommendation: initialized from %s", source)
    if not (source / "index.json").is_file():
        return
    fix = "an index.json that --export_t5 wrote, or none"
    index = read_json(source / "index.json", fix)
    if not isinstance(index, dict):
        raise ArtifactError(source / "index.json", "is no mapping of raw ids to tokens", fix=fix)
    ours = dict(zip(load_items(folder)["raw_id"], model.tokens[:-1].tolist(), strict=True))
    common = [item for item in ours if item in index]
    others = sum(ours[item] != index[item] for item in common)
    if others or not common:
        log.warning("%s: %d of the %d items have the semantic IDs that they have there", source / "index.json",
                    len(common) - others, len(ours))


def _require_free(target: Path, force: bool) -> None:
    """Nothing is replaced without --force, and nothing but an export ever."""
    if not target.exists():
        return
    if not force:
        raise ConfigError(f"--export_t5 {target}", "is there already", fix="--force, or another folder")
    others = sorted(path.name for path in target.iterdir() if path.name not in FILES) if target.is_dir() else ["a file"]
    if others:
        raise ConfigError(f"--export_t5 {target}", f"holds something else than an export: {others[0]}",
                          "--force replaces the whole folder", "another folder")
