"""Files that would run code if the program unpickled them, made objects from YAML tags, or imported them."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.publishing import meta_path, publish
from tests.faults.world import DATA, ENCODER_DECODER, QUANTIZE, RECOMMEND, RQVAE, RUNS, STAGES, World


class Canary:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class Hostile(NamedTuple):
    """A command, and the file that is put in its way."""

    write: Callable[[World, Path], None]  # called with the world and the path of the canary
    script: str
    flags: str
    code: int


def bare_pickle(canary: Path) -> bytes:
    return pickle.dumps(Canary(canary))


def object_array(canary: Path, *shape: int) -> bytes:
    """Return an .npy file whose values are pickled objects."""
    array = np.empty(shape, dtype=object)
    array.fill(Canary(canary))
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def torch_archive(canary: Path) -> bytes:
    """Return a file in the format of torch.save, which is a zip archive with a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Canary(canary)}, protocol=2))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def tag(canary: Path) -> str:
    """Return a YAML value that calls `open`."""
    return f"!!python/object/apply:builtins.open [{canary}, w]"


def replace(pattern: str, content: Callable[[Path], bytes]) -> Callable[[World, Path], None]:
    """Publish the content under the name of an existing artifact, with a meta file that fits."""
    def write(world: World, canary: Path) -> None:
        [path] = world.root.glob(pattern)
        meta = json.loads(meta_path(path).read_text(encoding="utf-8"))
        kept = {key: value for key, value in meta.items() if key not in ("sha256", "size")}
        publish(path, lambda staged: staged.write_bytes(content(canary)), kept)
    return write


def put(name: str, content: Callable[[Path], bytes | str]) -> Callable[[World, Path], None]:
    def write(world: World, canary: Path) -> None:
        found, path = content(canary), world.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found.encode() if isinstance(found, str) else found)
    return write


def plug_in(*names: str) -> Callable[[World, Path], None]:
    """Write Python files that create the canary when they are imported, and YAML files of the same name."""
    def write(world: World, canary: Path) -> None:
        for name in names:
            put(name, lambda canary: f"open({str(canary)!r}, 'w')\n")(world, canary)
            put(name.replace(".py", "_config.yaml"), lambda canary: "evil: {}\n")(world, canary)
            put(f"{Path(name).parent}/config.yaml", lambda canary: "evil: {}\n")(world, canary)
    return write


def run_config(canary: Path) -> str:
    return f"common: {tag(canary)}\nencoder_decoder: {{}}\n"


def text_model(weights: Callable[[Path], bytes]) -> Callable[[World, Path], None]:
    """Write a sentence-transformers model with pickled weights, and with code of its own."""
    def write(world: World, canary: Path) -> None:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
                 "vocab_size": 8, "model_type": "bert", "architectures": ["BertModel"]}
        put("model/config.json", lambda canary: json.dumps({**sizes, "auto_map": {"AutoModel": "evil.Model"}}))(
            world, canary)
        put("model/modules.json", lambda canary: json.dumps(
            [{"idx": 0, "name": "0", "path": "", "type": "evil.Model"}]))(world, canary)
        put("model/evil.py", lambda canary: f"open({str(canary)!r}, 'w')\nclass Model: pass\n")(world, canary)
        put("model/pytorch_model.bin", weights)(world, canary)
    return write


EMBED, RECOMMENDED = "dataloader.text_embedding", STAGES["recommend"]
PROCESS = STAGES["process"]
WITH_TEXT_MODEL = f"{DATA} --text_model model --suffix other"
FROM_T5 = f"{RUNS} {ENCODER_DECODER} --from_t5 t5"
IMPORT = f"{RUNS} --quantizer_name imported --file"
BEST = "runs/recommendation/tea/encoder_decoder/*/*/checkpoints/best.safetensors"
RUN_CONFIG = "runs/recommendation/tea/encoder_decoder/*/*/config.yaml"
TABLE = "data/tea/interactions.parquet"


def replace_text(pattern: str, content: Callable[[Path], str]) -> Callable[[World, Path], None]:
    def write(world: World, canary: Path) -> None:
        [path] = world.root.glob(pattern)
        path.write_text(content(canary), encoding="utf-8")
    return write


HOSTILE = {
    "embedding of objects": Hostile(replace("data/tea/tea.emb-td.npy", lambda canary: object_array(canary, 29, 4)),
                                    QUANTIZE, f"{RUNS} {RQVAE} --seed 1", 4),
    "embedding that is a pickle": Hostile(replace("data/tea/tea.emb-td.npy", bare_pickle), QUANTIZE,
                                          f"{RUNS} {RQVAE} --seed 1", 4),
    "codes of objects": Hostile(replace("data/tea/tea.codes-rqvae-td.npy", lambda canary: object_array(canary, 29, 3)),
                                RECOMMEND, f"{RUNS} {ENCODER_DECODER} --seed 1", 4),
    "codes that are a pickle": Hostile(replace("data/tea/tea.codes-rqvae-td.npy", bare_pickle), QUANTIZE,
                                       f"{RUNS} --explain", 4),
    "table that is a pickle": Hostile(replace(TABLE, bare_pickle), RECOMMEND, f"{RUNS} --model popularity", 4),
    "checkpoint that is a pickle": Hostile(replace(BEST, bare_pickle), RECOMMENDED.script, RECOMMENDED.flags, 4),
    "checkpoint of torch.save": Hostile(replace(BEST, torch_archive), RECOMMENDED.script, RECOMMENDED.flags, 4),
    "configuration of a run": Hostile(replace_text(RUN_CONFIG, run_config), RECOMMENDED.script, RECOMMENDED.flags, 4),
    "configuration of the only run": Hostile(replace_text(RUN_CONFIG, run_config), RECOMMEND, f"{RUNS} --compare", 4),
    "YAML of a model": Hostile(put("mine.yaml", lambda canary: f"rqvae: {tag(canary)}\n"), QUANTIZE,
                               f"{RUNS} {RQVAE} --config mine.yaml", 2),
    "YAML key": Hostile(put("mine.yaml", lambda canary: f"? {tag(canary)}\n: 1\n"), QUANTIZE,
                        f"{RUNS} {RQVAE} --config mine.yaml", 2),
    "YAML of the raw files": Hostile(put("data/tea/source.yaml", lambda canary: f"source: {tag(canary)}\n"),
                                     PROCESS.script, DATA, 2),
    "YAML of --source_config": Hostile(put("mine.yaml", lambda canary: f"interactions: {tag(canary)}\n"),
                                       PROCESS.script, f"{DATA} --source_config mine.yaml", 2),
    "quantizer in another folder": Hostile(plug_in("evil.py", "data/evil.py"), QUANTIZE,
                                           f"{RUNS} --quantizer_name ../../evil", 2),
    "quantizer in the current folder": Hostile(plug_in("evil.py", "evil/model.py"), QUANTIZE,
                                               f"{RUNS} --quantizer_name evil", 2),
    "recommender in another folder": Hostile(plug_in("evil/model.py"), RECOMMEND, f"{RUNS} --model ../evil", 2),
    "recommender in the current folder": Hostile(plug_in("evil.py", "evil/model.py"), RECOMMEND,
                                                 f"{RUNS} --model evil", 2),
    "modules of the program in the current folder": Hostile(
        plug_in("common.py", "torch.py", "quantization/models/rqva.py"), QUANTIZE, f"{RUNS} --quantizer_name rqva", 2),
    "imported IDs that are a pickle": Hostile(put("ids.json", bare_pickle), QUANTIZE, f"{IMPORT} ids.json", 3),
    "imported IDs of torch.save": Hostile(put("ids.pt", torch_archive), QUANTIZE, f"{IMPORT} ids.pt", 2),
    "interactions that are a pickle": Hostile(put("raw/events.csv", bare_pickle), PROCESS.script, PROCESS.flags, 3),
    "interactions of objects": Hostile(put("raw/events.npy", lambda canary: object_array(canary, 3, 3)),
                                       PROCESS.script, f"{DATA} --interactions raw/events.npy", 2),
    "items that are a pickle": Hostile(put("raw/items.parquet", bare_pickle), PROCESS.script,
                                       f"{DATA} --interactions raw/events.csv --items raw/items.parquet", 3),
    "T5 with pickled weights": Hostile(put("t5/pytorch_model.bin", torch_archive), RECOMMEND, FROM_T5, 3),
    "T5 that is a pickle": Hostile(
        lambda world, canary: [put(f"t5/{name}", bare_pickle)(world, canary)
                               for name in ("config.json", "model.safetensors", "index.json")], RECOMMEND, FROM_T5, 4),
    "text model with pickled weights": Hostile(text_model(bare_pickle), EMBED, WITH_TEXT_MODEL, 2),
    "text model of torch.save": Hostile(text_model(torch_archive), EMBED, WITH_TEXT_MODEL, 2),
}
