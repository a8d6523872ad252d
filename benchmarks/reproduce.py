"""Reproduce published results: prepare the data, make the semantic IDs, train and test with the published settings.

    python benchmarks/reproduce.py --list
    python benchmarks/reproduce.py sasrec-beauty --raw_dir <folder of the raw files>

The program runs the commands of the three stages, each in its own process. It prints a table of the paper, the best
other reproduction and this run, and writes it as Markdown and JSON. All commands resume: the same call continues an
interrupted training, and reuses everything that is finished.
"""

import argparse
import json
import logging
import shlex
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.cli import ROOT  # noqa: E402 (needs the path above)
from common.command import run_command  # noqa: E402
from common.config import Config  # noqa: E402
from common.errors import ConfigError, nearest  # noqa: E402
from common.output import show  # noqa: E402
from common.publishing import write_text  # noqa: E402
from common.run import latest_run, log_to_console  # noqa: E402
from common.steps import Step, module, run_steps, script  # noqa: E402
from common.tables import markdown  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PROTOCOLS = ("all", "unseen")
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
COLUMNS = ("system", "protocol", "R@5", "N@5", "R@10", "N@10", "minutes", "device", "seed", "commit")
NUM_USERS = {"Beauty": 22_363, "Toys_and_Games": 19_412}
NUM_EVENTS = {"Beauty": 198_502, "Toys_and_Games": 167_597}
INCLUDED = float("inf")  # users per second, if the time of the evaluation is in the time of the training
# Flags of recommendation/main.py that a reproduction sets itself.
OWN_FLAGS = ("--model", "--dataset", "--category", "--quantizer_name", "--embedding_suffix", "--tag", "--config",
             "--seed", "--seeds", "--device", "--max_steps", "--data_root", "--run_root", "--run_list")
MAX_CPU_HOURS = 2.0  # --list recommends a GPU for longer runs
MODULES = {"bash dataloader/0_download_dataset.sh": "dataloader.download",
           "bash dataloader/2_process.sh": "dataloader.process",
           "bash dataloader/3_get_text_emb.sh": "dataloader.text_embedding"}


class Row(NamedTuple):
    """Published test metrics: `values` in the order of METRICS, ranked over all items or over unseen items."""

    system: str
    values: tuple[float, float, float, float]
    protocol: str = "all"


class Speed(NamedTuple):
    """The expected speed on one kind of device."""

    targets_per_second: float  # in the training
    users_per_second: float    # in the evaluation
    code_hours: float = 0.0    # hours to make the semantic IDs


class Reproduction(NamedTuple):
    """A published result, and how this project reproduces it."""

    dataset: str
    model: str
    recipe: str                    # a file in recommendation/models/<model>/recipes
    published: tuple[Row, ...]     # first the paper, then the best known reproduction
    gpu: Speed
    cpu: Speed
    basis: str                     # where the two speeds come from
    notes: tuple[str, ...]         # the differences from the paper
    quantizer: str | None = None
    suffix: str = "td"             # the text embedding
    tag: str | None = None
    embedding_flags: tuple[str, ...] = ()
    code_flags: tuple[str, ...] = ()


TEXTS = ("The text embedding is all-MiniLM-L6-v2 with 384 dimensions. {paper}. The texts have title, brand, price and "
         "categories (`--template full`), and descriptions where the raw files have them.")
T5_TEXTS = TEXTS.format(paper="The published runs use sentence-t5-base with 768 dimensions")
TIGER = ("The settings are those of arXiv 2412.08604, which reproduce TIGER best, and not those of the paper.",
         T5_TEXTS,
         "The T5 has no user token, as in the best reproduction.")
TIGER_SPEED = ("GPU: 29.5 steps/s and 11,100 users/s of 4 + 4 layers (H100, without captured steps), scaled to 6 + 6 "
               "layers and batches of 64; RQ-VAE: 350 s. CPU: the training and the search were measured; RQ-VAE: one "
               "epoch per second, an estimate.")
WIDE = ("--config=quantization/configs/recipes/rqvae_wide.yaml",)
RPG = (TEXTS.format(paper="The paper uses text-embedding-3-large with 3,072 dimensions"),
       "OPQ gets a whitened PCA with 256 dimensions. The paper's has 512, and the embedding here has only 384.",
       "One dropout rate for the embeddings, the attention and the feed-forward layers. The paper has .5 for the first "
       "two and 0 for the third.",
       "Every item is scored. The paper's graph search has metrics within .002 of this in cornac.",
       "The blocks have RMSNorm, instead of GPT-2's LayerNorm. The heads are linear, instead of residual blocks.",
       "Sequences are split at random points. A batch has 1,536 targets instead of 256 sequences, so that there are "
       "about as many steps.",
       "Items with equal codes move to the nearest free code of the last level.")
RPG_SPEED = ("GPU: the whole run of cornac 3.0.1, with evaluations: 2,502 s on Beauty, 1,682 s on Toys. CPU: measured "
             "with 32 levels, and doubled for 16 levels.")
SASREC = ("The loss is the softmax over all items, instead of binary cross-entropy with sampled negatives.",
          "Width 64, two layers, dropout .5, learning rate .001. cornac's best run on Beauty has binary cross-entropy, "
          "width 128, dropout .2 and learning rate .0005.",
          "The first row is SASRec in the paper of TIGER, because SASRec's own paper ranks 100 sampled items. These "
          "numbers come from the authors of S3-Rec, whose code excludes the items of the history.",
          "Every position of a sequence is a target. The blocks are pre-norm and have no bias terms.")
SASREC_SPEED = "GPU: an estimate. CPU: measured, 4,600 to 6,500 targets/s and 7,000 users/s."

REPRODUCTIONS = {
    "tiger-beauty": Reproduction(
        "Beauty", "encoder_decoder", "beauty.yaml",
        (Row("TIGER, paper (arXiv 2305.05065)", (.0454, .0321, .0648, .0384)),
         Row("TIGER, cornac 3.0.1", (.0419, .0270, .0634, .0338))),
        Speed(1_260, 7_400, 0.1), Speed(107, 20, 2.2), TIGER_SPEED, TIGER, "rqvae", tag="wide", code_flags=WIDE),
    "tiger-toys": Reproduction(
        "Toys_and_Games", "encoder_decoder", "toys.yaml",
        (Row("TIGER, paper (arXiv 2305.05065)", (.0521, .0371, .0712, .0432)),
         Row("TIGER, cornac 3.0.1, rkmeans", (.0362, .0237, .0583, .0308))),
        Speed(1_260, 7_400, 0.1), Speed(67, 14, 2.2), TIGER_SPEED,
        (*TIGER, "The semantic IDs are those of RQ-VAE, as in the paper. cornac's best run has residual k-means."),
        "rqvae", tag="wide", code_flags=WIDE),
    "rpg-beauty": Reproduction(
        "Beauty", "encoder_retrieve", "rpg.yaml",
        (Row("RPG, paper (arXiv 2506.05781)", (.0550, .0381, .0809, .0464)),
         Row("RPG, cornac 3.0.1", (.0533, .0372, .0789, .0454))),
        Speed(7_900, INCLUDED), Speed(440, 205, 0.1), RPG_SPEED, RPG, "opq", "white",
        embedding_flags=("--pca=256", "--whiten"), code_flags=("--num_levels=32",)),
    "rpg-toys": Reproduction(
        "Toys_and_Games", "encoder_retrieve", "rpg_toys.yaml",
        (Row("RPG, paper (arXiv 2506.05781)", (.0592, .0401, .0869, .0490)),
         Row("RPG, cornac 3.0.1", (.0613, .0415, .0898, .0506))),
        Speed(9_750, INCLUDED), Speed(880, 410, 0.1), RPG_SPEED, RPG, "opq", "white",
        embedding_flags=("--pca=256", "--whiten"), code_flags=("--num_levels=16",)),
    "sasrec-beauty": Reproduction(
        "Beauty", "sasrec", "beauty.yaml",
        (Row("SASRec in TIGER's paper", (.0387, .0249, .0605, .0318), "unseen"),
         Row("SASRec, tuned, cornac 3.0.1", (.0508, .0348, .0740, .0423))),
        Speed(25_000, 20_000), Speed(5_500, 7_000), SASREC_SPEED, SASREC),
    "sasrec-toys": Reproduction(
        "Toys_and_Games", "sasrec", "toys.yaml",
        (Row("SASRec in TIGER's paper", (.0463, .0306, .0675, .0374), "unseen"),),
        Speed(25_000, 20_000), Speed(5_500, 7_000), SASREC_SPEED,
        (*SASREC, "We know of no other reproduction that ranks all items of this dataset.")),
    "letter-beauty": Reproduction(
        "Beauty", "encoder_decoder", "letter.yaml",
        (Row("LETTER, paper (arXiv 2405.07314)", (.0431, .0286, .0672, .0364)),
         Row("cornac 3.0.1 on LETTER's semantic IDs", (.0420, .0279, .0656, .0354)),
         Row("LETTER's code on its semantic IDs", (.0413, .0268, .0645, .0343))),
        Speed(7_550, 15_500), Speed(151, 54),
        "GPU: 29.5 steps/s with batches of 256 (H100, without captured steps). CPU: measured.",
        ("The semantic IDs are those that LETTER publishes, which need neither a text embedding nor a tokenizer.",
         "13 items have the semantic ID of another item. They get a disambiguation level; in LETTER's code, they count "
         "as one candidate."), "imported"),
}


class Command(NamedTuple):
    """A command of a stage, with relative paths and without the folders of the data and the runs."""

    title: str
    program: str             # `bash dataloader/….sh` or the path of a Python file
    flags: tuple[str, ...]
    folders: dict[str, Path]  # flag -> folder or file

    def as_step(self) -> Step:
        flags = [f"--config={ROOT / flag.removeprefix('--config=')}" if flag.startswith("--config=") else flag
                 for flag in self.flags]
        words = [*flags, *(f"{flag}={path.absolute()}" for flag, path in self.folders.items())]
        name = MODULES.get(self.program)
        return Step(self.title, module(name, *words) if name else script(self.program, *words))

    def shown(self) -> str:
        """Return the command as text. Folders that differ between machines are left out or have a placeholder."""
        program = self.program if self.program in MODULES else f"python {self.program}"
        given = [f"{flag} <{flag.removeprefix('--')}>" for flag in self.folders if flag in ("--raw_dir", "--file")]
        return " ".join([program, *map(shlex.quote, self.flags), *given])


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    if args.list:
        show(listing())
        return
    if args.name not in REPRODUCTIONS:
        raise ConfigError(args.name or "name", "unknown reproduction", nearest(args.name or "", sorted(REPRODUCTIONS)),
                          f"use one of {', '.join(REPRODUCTIONS)}, or --list")
    reproduction = REPRODUCTIONS[args.name]
    if args.raw_dir is None and reproduction.quantizer == "imported" and args.ids is None:
        raise ConfigError("--ids", "is missing", "LETTER's semantic IDs are not downloaded",
                          "add --ids FILE, a JSON file such as {\"<raw id>\": [\"<a_12>\", \"<b_3>\", …], …}")
    own = [word for word in shlex.split(args.flags) if word.partition("=")[0] in OWN_FLAGS]
    if own:
        raise ConfigError("--flags", f"cannot have {own[0]}", "The program sets this flag itself",
                          "leave it out; this program has --seed, --max_steps, --device, --data_root and --run_root")
    out = args.out or default_out(args)
    if out.is_dir() or out.suffix == ".md":
        raise ConfigError("--out", f"cannot be {out}", "It is the JSON file, and the Markdown file is next to it",
                          "name a file such as result.json")
    log_to_console()
    with tempfile.TemporaryDirectory(prefix="reproduce-") as scratch:
        run_list = Path(scratch) / "runs"
        run_steps([command.as_step() for command in plan(reproduction, args, run_list)])
        run = Path(run_list.read_text(encoding="utf-8").splitlines()[-1])
    result = collect(args.name, reproduction, args, run)
    text = page(result)
    write_text(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    write_text(out.with_suffix(".md"), text)
    show(f"{text}\nreproduce: wrote {out} and {out.with_suffix('.md').name}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(REPRODUCTIONS)}")
    parser.add_argument("--list", action="store_true", help="show all reproductions: steps, device, hours, results")
    parser.add_argument("--data_root", type=Path, default=ROOT / "data", metavar="DIR")
    parser.add_argument("--run_root", type=Path, default=ROOT / "runs", metavar="DIR")
    parser.add_argument("--raw_dir", type=Path, metavar="DIR",
                        help="the folder with the raw files (default: download those of Amazon 2014)")
    parser.add_argument("--ids", type=Path, metavar="FILE", help="for letter-beauty: the file with LETTER's semantic "
                        "IDs (default: letter_semantic_ids.json in --raw_dir)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n>")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the training; the semantic IDs have seed 0")
    parser.add_argument("--flags", default="", metavar="TEXT", help="more flags of recommendation/main.py, such as "
                        "--flags='--precision=bfloat16'; the notes of the table name them")
    parser.add_argument("--max_steps", type=int, metavar="N", help="train for N steps only, to test the program")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON file with the result; the Markdown file is "
                        "next to it (default: benchmarks/results/reproduce-<name>.json; with --max_steps or "
                        "--flags, a file in --run_root)")
    return parser


def default_out(args: argparse.Namespace) -> Path:
    seed = f"-seed{args.seed}" if args.seed else ""
    if args.max_steps is not None:
        return args.run_root / f"reproduce-{args.name}{seed}-{args.max_steps}-steps.json"
    if args.flags:  # not the recipe
        return args.run_root / f"reproduce-{args.name}{seed}-other-flags.json"
    return RESULTS / f"reproduce-{args.name}{seed}.json"


def plan(reproduction: Reproduction, args: argparse.Namespace, run_list: Path | None = None) -> list[Command]:
    """Return the commands of a reproduction, in the order in which they run."""
    dataset, data = f"--dataset={reproduction.dataset}", {"--data_root": args.data_root}
    raw = {} if args.raw_dir is None else {"--raw_dir": args.raw_dir}
    source = ["--source=amazon14"] if args.raw_dir is None else []  # otherwise, the files in the folder decide
    commands = [] if raw else [Command("download", "bash dataloader/0_download_dataset.sh", (dataset, *source), data)]
    commands.append(Command("data", "bash dataloader/2_process.sh", (dataset, *source, "--template=full"), data | raw))
    codes = codes_of(reproduction, args)
    runs = data | {"--run_root": args.run_root}
    if reproduction.quantizer is not None:
        commands += _code_commands(reproduction, args, dataset, [*codes, *_smoke(reproduction, args)], runs)
    commands.append(Command(
        "training and test", "recommendation/main.py",
        (f"--model={reproduction.model}", dataset, *codes, f"--config={recipe_path(reproduction)}",
         f"--seed={args.seed}", f"--device={args.device}",
         *([] if args.max_steps is None else [f"--max_steps={args.max_steps}"]), *shlex.split(args.flags)),
        runs | ({"--run_list": run_list} if run_list else {})))
    return commands


def _code_commands(reproduction: Reproduction, args: argparse.Namespace, dataset: str, flags: list[str],
                   runs: dict[str, Path]) -> list[Command]:
    """Return the commands that make the text embedding, if it is needed, and the semantic IDs."""
    if reproduction.quantizer == "imported":
        ids = args.ids or (args.raw_dir or Path()) / "letter_semantic_ids.json"
        return [Command("semantic IDs", "quantization/main.py", (dataset, *flags), runs | {"--file": ids})]
    return [Command("text embedding", "bash dataloader/3_get_text_emb.sh",
                    (dataset, f"--suffix={reproduction.suffix}", *reproduction.embedding_flags,
                     f"--device={args.device}"), {"--data_root": args.data_root}),
            Command("semantic IDs", "quantization/main.py",
                    (dataset, *flags, *reproduction.code_flags, f"--device={args.device}"), runs)]


def codes_of(reproduction: Reproduction, args: argparse.Namespace) -> list[str]:
    """Return the flags that select the semantic IDs. Codes of a test of this program have a tag of their own."""
    if reproduction.quantizer is None:
        return []
    tag = "-".join(filter(None, [reproduction.tag, "smoke" if _smoke(reproduction, args) else None]))
    return [f"--quantizer_name={reproduction.quantizer}", f"--embedding_suffix={reproduction.suffix}",
            *([f"--tag={tag}"] if tag else [])]


def _smoke(reproduction: Reproduction, args: argparse.Namespace) -> list[str]:
    """Return the flags that shorten the training of the quantizer: only RQ-VAE is trained by gradient."""
    return [f"--max_steps={args.max_steps}"] if args.max_steps is not None and reproduction.quantizer == "rqvae" else []


def recipe_path(reproduction: Reproduction) -> str:
    """Return the path of the recipe, relative to the root."""
    return f"recommendation/models/{reproduction.model}/recipes/{reproduction.recipe}"


def read_recipe(reproduction: Reproduction) -> Config:
    from recommendation.options import read_flags

    return read_flags([f"--model={reproduction.model}", f"--category={reproduction.dataset}",
                       f"--config={ROOT / recipe_path(reproduction)}"])[1]


def hours(reproduction: Reproduction, speed: Speed) -> float:
    """Return the expected hours of the semantic IDs, the training and the evaluations. Early stopping is not counted.

    With leave-one-out, all events of a user but the first and the last two are training targets.
    """
    params = read_recipe(reproduction).training_params
    users = NUM_USERS[reproduction.dataset]
    per_epoch = NUM_EVENTS[reproduction.dataset] - 3 * users
    targets = params["epochs"] * per_epoch
    if params["max_steps"] is not None:
        targets = min(targets, params["max_steps"] * params["batch_size"])
    evaluated = users * (targets / per_epoch / params["eval_every"] + 4)  # in the end: two splits, two protocols
    seconds = targets / speed.targets_per_second + evaluated / speed.users_per_second
    return seconds / 3600 + speed.code_hours


def listing() -> str:
    """Return a table of all reproductions, and where the expected hours come from."""
    args, rows, basis = make_parser().parse_args([]), [], dict[str, list[str]]()
    for name, reproduction in REPRODUCTIONS.items():
        steps = [command.title for command in plan(reproduction, args)]
        on_gpu, on_cpu = (hours(reproduction, speed) for speed in (reproduction.gpu, reproduction.cpu))
        path = RESULTS / f"reproduce-{name}.json"
        rows.append([name, ", ".join(steps), "cpu" if on_cpu <= MAX_CPU_HOURS else "gpu", f"{on_gpu:.1f}",
                     f"{on_cpu:.1f}", str(path.relative_to(ROOT)) if path.exists() else "none"])
        basis.setdefault(reproduction.basis, []).append(name)
    return "\n".join([
        markdown(("name", "steps", "device", "hours on a GPU", "hours on one CPU core", "result"), rows), "",
        "The hours count the semantic IDs, the training without early stopping, and the evaluations. The text "
        "embedding takes about ten minutes more on a CPU core. Where the speeds come from:", "",
        *(f"- {', '.join(names)}: {text}" for text, names in basis.items())])


def collect(name: str, reproduction: Reproduction, args: argparse.Namespace, run: Path) -> dict:
    """Return the result of a finished run, as it is written to the JSON file. It has no paths of this machine."""
    metrics, finished = (json.loads((run / file).read_text(encoding="utf-8"))
                         for file in ("metrics.json", "finished.json"))
    minutes = {"training": _seconds(run) / 60}
    if reproduction.quantizer is not None:
        variant = "-".join(flag.partition("=")[2] for flag in codes_of(reproduction, args))
        made = latest_run(args.run_root / "quantization" / reproduction.dataset / variant)
        if made and (made / "times.json").exists():  # quantizers without training do not measure their time
            minutes["semantic IDs"] = _seconds(made) / 60
    _, _, hardware = finished["machine"].partition(", ")  # without the version of the operating system
    cores, _, gpu = hardware.partition(", ")
    device = f"{gpu}, {cores}" if gpu and args.device != "cpu" else f"CPU, {finished['threads']} of {cores}"
    commit, sign, dirty = (finished["commit"] or "unknown").partition("-")
    ours = [{"system": "ours", "protocol": protocol,
             **{metric: round(metrics["alone"]["test"][protocol][metric], 4) for metric in METRICS},
             "minutes": round(sum(minutes.values()), 1), "device": device, "seed": args.seed,
             "commit": commit[:7] + sign + dirty} for protocol in PROTOCOLS]
    published = [{"system": row.system, "protocol": row.protocol, **dict(zip(METRICS, row.values, strict=True))}
                 for row in reproduction.published]
    notes = [*reproduction.notes, *_settings(run, reproduction.model)]
    if args.flags:
        notes.append(f"Other settings than in the recipe: `{args.flags}`.")
    if args.max_steps is not None:
        notes.insert(0, f"A test of the program with {args.max_steps} training steps: ours is not a result.")
    words = [f"--seed={args.seed}"] if args.seed else []
    if args.max_steps is not None:
        words.append(f"--max_steps={args.max_steps}")
    if args.flags:
        words.append(f"--flags={shlex.quote(args.flags)}")
    return {"name": name, "dataset": reproduction.dataset, "model": reproduction.model, "rows": published + ours,
            "minutes": {part: round(value, 1) for part, value in minutes.items()},
            **{key: metrics[key] for key in ("protocol", "best_epoch", "num_parameters")},
            "valid": {protocol: {metric: round(metrics["alone"]["valid"][protocol][metric], 4) for metric in METRICS}
                      for protocol in PROTOCOLS},
            "date": finished["date"], "python": finished["python"], "torch": finished["torch"],
            "command": " ".join([f"python benchmarks/reproduce.py {name}", *words]),
            "commands": [command.shown() for command in plan(reproduction, args)], "notes": notes}


def _seconds(run: Path) -> float:
    """Return the seconds that a run took, with those before an interruption."""
    return sum(json.loads((run / "times.json").read_text(encoding="utf-8")).values())


def _settings(run: Path, model: str) -> list[str]:
    """Return notes on the training that depend on the configuration of the run."""
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))[model]
    params, notes = config["training_params"], []
    if config["model_params"].get("train_on") == "every_position":
        notes.append("Every position of a window is a target of one pass. The paper has one target per sample.")
    if params["precision"] != "float32":
        notes.append(f"Training steps on CUDA use {params['precision']}.")
    schedule = f"{params['lr_schedule']} schedule with {params['warmup_steps']:,} warm-up steps"
    return [*notes, f"{params['optimizer']}, learning rate {params['lr']}, {schedule}, weight decay "
                    f"{params['weight_decay']}, batches of {params['batch_size']:,} targets, at most "
                    f"{params['epochs']} epochs."]


def page(result: dict) -> str:
    """Return the table and the notes of a result as Markdown."""
    rows = [[row["system"], row["protocol"], *(f"{row[metric]:.4f}".removeprefix("0") for metric in METRICS),
             *("" if row.get(name) is None else str(row[name]) for name in ("minutes", "device", "seed", "commit"))]
            for row in result["rows"]]
    minutes = ", ".join(f"{part} {value}" for part, value in result["minutes"].items())
    return "\n".join([
        f"# Reproduction: {result['name']}", "", markdown(COLUMNS, rows), "",
        f"Test split of {result['dataset']}, leave-one-out, ranked over the whole catalogue. `all`: every item can be "
        "recommended. `unseen`: the items of the history are excluded. The checkpoint is selected by validation "
        f"ndcg@10 ({result['protocol']} items). Minutes: {minutes}, without the data and the text embedding. Best "
        f"epoch: {result['best_epoch']}. torch {result['torch']}.", "",
        *(f"- {note}" for note in result["notes"]), "", "```bash", result["command"], "```", "", "It runs:", "",
        "```bash", *result["commands"], "```", ""])


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(run_command(main))
