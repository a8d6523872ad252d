"""The quantization pipeline: load the embeddings, train a quantizer, report its quality, publish the semantic IDs."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import torch

from common.artifacts import DatasetFolder, dataset_line, variant
from common.config import Config
from common.device import resolve_device
from common.digest import code_digest
from common.distributed import process_group
from common.errors import TrainingError
from common.publishing import file_sha256, write_text
from common.run import Run, log_to_console
from quantization.dataset import Embeddings
from quantization.evaluate import EvaluationData
from quantization.inspection.diagnostics import collapse_warning, collapsed_levels, diagnose, settings_of
from quantization.models import find_class, model_path
from quantization.models.abstract_vq import AbstractVQ
from quantization.trainer import Trainer, is_published

log = logging.getLogger("quantization")

EVALUATION = "evaluation.json"


class Options(NamedTuple):
    """Command-line options of a run that are not part of its configuration."""

    run_root: Path
    suffix: str
    tag: str | None
    force: bool   # repeat a finished run
    strict: bool  # raise an error if a codebook has collapsed


def train(config: Config, folder: DatasetFolder, options: Options, command: str) -> None:
    """Train one quantizer and publish its codes.

    If a finished run with the same configuration and inputs exists, its codes are reused, unless `options.force` is
    set.
    """
    run_root, suffix, tag, force, strict = options
    log_to_console()
    log.info("quantization: %s", dataset_line(folder))
    device = resolve_device(config["common"]["device"], config.origins["common.device"])
    model_class = find_class(config.name)
    embeddings = Embeddings.load(folder, model_class.embedding_suffixes(config.values, suffix))
    other_files = {str(path): file_sha256(path) for path in model_class.other_files(config.values)}
    model_config = config.for_model(num_items=len(embeddings.xs), inputs=embeddings.inputs, folder=folder)
    torch.manual_seed(config["common"]["seed"])
    model: AbstractVQ = model_class(model_config, input_size=embeddings.xs.shape[1])
    config.check_all_read(model_config)
    config.check_training_keys(model_config, by_gradient=model.trained_by_gradient())
    settings = settings_of(config, model, len(embeddings.xs))
    evaluation_inputs = EvaluationData.inputs(folder, suffix)
    run = Run(run_root / "quantization" / folder.name / variant(config.name, suffix, tag), config.values,
              evaluation_inputs | embeddings.hashes | other_files, command,
              code_digest(model_path(config.name), Path(__file__).parent))
    codes = folder.codes(config.name, suffix, tag)
    if run.finished and not force and is_published(codes, run.id):
        log.info("quantization: reusing %s (run %s is finished; use --force to repeat it)", codes, run.id)
        run.make_latest()
        if strict:
            report(run.folder, run.summary()["metrics"], config, settings, strict=True)
        return
    with process_group(device), run.open(force):
        trainer = Trainer(model, embeddings, config, run, device, EvaluationData.load(folder, suffix))
        metrics = trainer.train()
        text, collapse = report(run.folder, metrics, config, settings, strict)
        info = {"run": run.id, "quantizer": config.name, "collapse": collapse}
        meta = trainer.publish(codes, command, info | ({"made_from": other_files} if other_files else {}))
        run.finish({"metrics": metrics, "codebook_sizes": meta["codebook_sizes"],
                    "num_parameters": sum(p.numel() for p in model.parameters()),
                    **{key: meta[key] for key in ("disambiguation", "collision_rate_before", "collision_rate_after")}})
    log.info("%s", text)
    log.info("quantization: %s on %s: collision rate %.4f, after disambiguation %.4f", config.name, folder.name,
             meta["collision_rate_before"], meta["collision_rate_after"])
    log.info("quantization: wrote %s; codebook sizes %s", codes, meta["codebook_sizes"])
    if meta["collision_rate_after"]:
        log.warning("quantization: recommenders cannot use the semantic IDs, because some items share an ID; use "
                    "--disambiguation extra_level to make the IDs distinct")


def report(folder: Path, metrics: dict, config: Config, settings: dict, strict: bool) -> tuple[str, str | None]:
    """Write the metrics and the diagnostics to evaluation.json in `folder`.

    Returns the diagnostics as text, and a warning if a codebook has collapsed (else None). With `strict`, raises
    TrainingError if a codebook has collapsed.
    """
    lines = diagnose(metrics, settings)
    write_text(folder / EVALUATION, json.dumps({"metrics": metrics, "diagnostics": lines}, indent=2) + "\n")
    collapsed, warning = collapsed_levels(metrics, config["common"]["min_utilization"]), None
    if collapsed:
        warning = collapse_warning(metrics, collapsed, settings)
        if strict:
            raise TrainingError(folder, warning, fix="change the settings, or leave out --strict")
        log.warning("quantization: WARNING: %s", warning)
    return "\n".join(["", "Quality of the semantic IDs", *(f"  {line}" for line in lines), ""]), warning
