"""A folder with the raw files, the data and the runs of a small dataset, and the commands that write there."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common.errors import ResourceError
from common.publishing import file_sha256, meta_path
from tests.errors import Outcome

ROOT = Path(__file__).resolve().parents[2]
INJECTION = Path(__file__).resolve().parent / "injection"
NUM_ITEMS, NUM_USERS = 30, 40
SECONDS_AT_MOST = 100
DATA = "--dataset tea --data_root data"
RUNS = f"{DATA} --run_root runs"
# Small models. They save a checkpoint after every step.
RQVAE = ("--quantizer_name rqvae --hidden_sizes [16] --latent_size 8 --num_levels 2 --codebook_size 4 --epochs 2 "
         "--eval_every 1 --checkpoint_seconds 0")
ENCODER_DECODER = ("--model encoder_decoder --d_model 16 --d_ff 16 --d_kv 8 --num_heads 2 --num_encoder_layers 1 "
                   "--num_beams 5 --batch_size 64 --max_steps 5 --checkpoint_seconds 0 --prior none")
QUANTIZE, RECOMMEND = "quantization/main.py", "recommendation/main.py"


class Stage(NamedTuple):
    """A command that writes files."""

    script: str      # a file or a module of the program
    flags: str
    other: str = ""  # further flags, with which the command writes other contents


# Each stage reads what earlier stages have written.
STAGES = {
    "process": Stage("dataloader.process", f"{DATA} --interactions raw/events.csv --items raw/items.csv",
                     "--min_user_interactions 6"),
    "text_embedding": Stage("dataloader.text_embedding", f"{DATA} --text_model tfidf", "--pca 8"),
    "rkmeans": Stage(QUANTIZE, f"{RUNS} --quantizer_name rkmeans --num_levels 2 --codebook_size 4", "--seed 1"),
    "rqvae": Stage(QUANTIZE, f"{RUNS} {RQVAE}", "--seed 1"),
    "encoder_decoder": Stage(RECOMMEND, f"{RUNS} {ENCODER_DECODER}", "--seed 1"),
    "sasrec": Stage(RECOMMEND, f"{RUNS} --model sasrec --d_model 16 --max_steps 1", "--seeds 1"),
    "recommend": Stage("recommendation/recommend.py", f"{RUNS} --user U003 --output out/list.txt", "--top_k 3"),
    "compare": Stage(RECOMMEND, f"{RUNS} --compare"),
    "compare_quantizers": Stage(QUANTIZE, f"{RUNS} --compare"),
    "explain": Stage(QUANTIZE, f"{RUNS} --explain"),
    "export_embeddings": Stage(RECOMMEND, f"{RUNS} --model sasrec --export_item_embeddings learned"),
    "export_recbole": Stage("dataloader.process", f"{DATA} --export_recbole out/recbole"),
    "export": Stage(QUANTIZE, f"{RUNS} --export out/ids"),
    "export_t5": Stage(RECOMMEND, f"{RUNS} --export_t5 out/t5 --force"),
}
FOLDERS = ("data", "runs", "out")  # where the commands write
VOLATILE = {".lock", "run.log", "times.json"}  # the contents of these files depend on the time and the process
TEMPORARY = re.compile(r"\.(tmp|old)-[0-9a-f]{16}$|^\.work$")


class World(NamedTuple):
    root: Path

    def run(self, script: str, *words: str, fault: dict | None = None, cwd: Path | None = None,
            **environment: str | None) -> Outcome:
        """Run a command in a process of its own. A variable of the environment that is None is removed."""
        done = subprocess.run(command_line(script, *words), cwd=cwd or self.root, env=variables(fault, environment),
                              capture_output=True, text=True, errors="replace", timeout=SECONDS_AT_MOST, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def start(self, script: str, *words: str, fault: dict | None = None) -> subprocess.Popen:
        return subprocess.Popen(command_line(script, *words), cwd=self.root, env=variables(fault, {}), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def copy(self, target: Path) -> "World":
        shutil.copytree(self.root, target)
        return World(target.resolve())

    def data(self, name: str) -> Path:
        return self.root / "data" / "tea" / name

    def files(self) -> dict[str, bytes]:
        """Return the contents of all files that the commands have completed: name in the folder -> content.

        What depends on the time, the process or the place of the folder is left out.
        """
        return {name: self._content(path) for name, path in self._paths().items()
                if path.name not in VOLATILE and not is_temporary(name)}

    def temporary(self) -> list[str]:
        """Return the names of the temporary files."""
        return [name for name in self._paths() if is_temporary(name)]

    def artifacts(self) -> list[Path]:
        """Return the files that have a meta file."""
        found = self._paths().values()
        return [path for path in found if meta_path(path) in found]

    def mismatched(self) -> list[Path]:
        """Return the artifacts that have another content than their meta files or their staged meta files say."""
        return [path for path in self.artifacts() if file_sha256(path) not in (
            json.loads(file.read_bytes())["sha256"] for file in (meta_path(path), *_staged_metas(path)))]

    def check_full_disk(self, outcome: Outcome) -> None:
        """Fail if the outcome is not the error of a full disk at a file or folder of this world."""
        assert outcome.code == ResourceError.exit_code, outcome.err
        error = outcome.error
        assert error.fix, outcome.err
        assert "Exception ignored" not in outcome.err, outcome.err
        assert "bytes are free" in outcome.err or os.strerror(errno.EFBIG) in outcome.err, outcome.err
        assert (self.root / error.where).relative_to(self.root).parts[0] in FOLDERS, outcome.err

    def _paths(self) -> dict[str, Path]:
        found = [path for top in FOLDERS for path in (self.root / top).rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): path for path in sorted(found)}

    def _content(self, path: Path) -> bytes:
        content = path.read_bytes().replace(os.fsencode(self.root), b"<root>")
        if path.name != "finished.json":
            return content
        summary = json.loads(content)
        return json.dumps({key: value for key, value in summary.items() if key not in ("date", "users_per_second")},
                          sort_keys=True).encode()


def _staged_metas(path: Path) -> list[Path]:
    """Return the complete staged meta files of an artifact."""
    return [file for file in path.parent.glob(f".{meta_path(path).name}.tmp-*") if file.read_bytes().endswith(b"}\n")]


def is_temporary(name: str) -> bool:
    return any(TEMPORARY.search(part) for part in Path(name).parts)


def command_line(script: str, *words: str) -> list[str]:
    """Return the command that runs a file or a module of the program."""
    return [sys.executable, *([str(ROOT / script)] if script.endswith(".py") else ["-P", "-m", script]), *words]


def variables(fault: dict | None, more: dict[str, str | None]) -> dict[str, str]:
    """Return the environment of a command, with a fault (see injection/sitecustomize.py).

    With one thread, the results of a busy machine have the same bytes.
    """
    folders = [str(INJECTION)] * bool(fault) + [str(ROOT)]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders),
             "FAULT": json.dumps(fault or {}), **more}
    return {key: value for key, value in given.items() if value is not None}


def write_raw(folder: Path) -> None:
    """Write the events and the items of a small shop. The next item of a user is close to the previous one."""
    rng, kinds = random.Random(7), ("green tea", "black tea", "oolong", "mug", "pot")
    items = ["item_id,title,description"]
    items += [f"T{item:03d},{kinds[item % 5]} no. {item},from garden {item % 7} of size {item % 4}"
              for item in range(NUM_ITEMS)]
    events = ["user_id,item_id,timestamp"]
    for user in range(NUM_USERS):
        item = rng.randrange(NUM_ITEMS)
        for step in range(rng.randrange(5, 10)):
            events.append(f"U{user:03d},T{item:03d},{1_700_000_000 + 86_400 * step + user}")
            item = (item + rng.choice((1, 1, 2, 5))) % NUM_ITEMS
    folder.mkdir(parents=True)
    for name, lines in (("items.csv", items), ("events.csv", events)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
