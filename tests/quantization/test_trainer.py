"""The trainer from embeddings to the published artifact."""

import json
import math
import signal

import numpy as np
import pytest
import torch

from common.artifacts import DatasetFolder, ids_sha256, load_codes
from common.checkpoint import Checkpoints
from common.command import stop_request
from common.config import resolve
from common.errors import ArtifactError, ConfigError, DataError, Interrupted, TrainingError
from common.run import Run
from quantization.dataset import Embeddings
from quantization.evaluate import EvaluationData
from quantization.models import CONFIGS
from quantization.models.abstract_vq import AbstractVQ
from quantization.models.rqvae import RQVAE
from quantization.trainer import QuantizerTask, Trainer, is_published
from tests.errors import refused

from .conftest import NUM_ITEMS, WIDTH, numbers
from .tiny_data import save_items


class Signs(AbstractVQ):
    """Fits in one call: one level per column, with code 1 above the median of the column."""

    def __init__(self, config, input_size):
        super().__init__(config)
        self.register_buffer("medians", torch.zeros(input_size))

    def fit(self, xs, generator):
        self.medians = xs.median(dim=0).values
        return True

    def forward(self, xs):
        return xs, xs.new_zeros(()), self.get_codes(xs)

    def get_codes(self, xs):
        assert not self.training
        return (xs > self.medians).long()

    def compute_loss(self, forward_outputs, original_xs):
        return {"loss_total": forward_outputs[1]}


class Atomic(Signs):
    """Reads no embedding: two neighbouring item numbers share a code until disambiguation."""

    @classmethod
    def embedding_suffixes(cls, config, suffix):
        return []

    @property
    def codebook_sizes(self):
        return [NUM_ITEMS // 2 + 1]

    def get_codes(self, xs):
        return xs // 2


class Spacious(Atomic):
    """Has unused codes."""

    @property
    def codebook_sizes(self):
        return [NUM_ITEMS]


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.publishing._sync", lambda path: None)
        yield


@pytest.fixture
def folder(tmp_path) -> DatasetFolder:
    return save_items(DatasetFolder(tmp_path / "data", "Tiny"), NUM_ITEMS)


def embeddings_of(folder: DatasetFolder, xs: torch.Tensor) -> Embeddings:
    none = Embeddings.load(folder, [])
    return none._replace(xs=xs.numpy(), inputs={"td": xs.shape[1]})


@pytest.fixture
def train(tmp_path, folder):
    """model, config, embeddings -> the run, the metrics, and the meta of the published codes `q-td`."""
    def train(model, config, embeddings, command="a command", reference=EvaluationData(None, None)):  # noqa: B008 (immutable)
        run = Run(tmp_path / "runs", config.values, embeddings.hashes, command)
        with run.open(force=False):
            trainer = Trainer(model, embeddings, config, run, torch.device("cpu"), reference)
            metrics = trainer.train()
            meta = trainer.publish(folder.codes("q", "td", None), command, {"quantizer": "q"})
        return run, metrics, meta

    return train


@pytest.fixture
def plain_config(tmp_path):
    """The config of a quantizer without keys of its own."""
    (tmp_path / "plain.yaml").write_text("plain:\n  training_params:\n    eval_batch_size: 7\n")
    return resolve("plain", tmp_path / "plain.yaml", CONFIGS / "defaults.yaml", [])


def test_a_trained_quantizer_publishes_distinct_codes_with_their_meta(make_config, make_model, train, folder, xs):
    config = make_config("rqvae", num_levels=1, codebook_size=4)
    run, metrics, _ = train(make_model(config), config, embeddings_of(folder, xs))
    codes, meta = load_codes(folder, "q", "td", None)  # checks ranges and distinctness
    sizes = np.unique(codes[:, 0], return_counts=True)[1]
    assert codes.dtype == np.int32
    assert codes.shape == (NUM_ITEMS, 2)
    assert meta["codebook_sizes"] == [4, sizes.max()]
    assert meta["disambiguation_level"] == 1
    assert meta["collision_rate_before"] == metrics["collision_rate"] == 1 - len(sizes) / NUM_ITEMS
    assert meta["collision_rate_after"] == 0.0
    assert meta["items_sha256"] == ids_sha256(f"raw {item}" for item in range(NUM_ITEMS))
    assert set(meta["inputs"]) == {"items.parquet"}
    assert (meta["quantizer"], meta["command"]) == ("q", "a command")
    assert len(run.metrics.read_text().splitlines()) == 3  # epochs


def test_codes_that_are_distinct_get_no_extra_level(make_config, make_model, train, folder):
    far_apart = torch.eye(WIDTH)[torch.arange(NUM_ITEMS) % WIDTH] * torch.arange(1, NUM_ITEMS + 1).unsqueeze(1)
    config = make_config("rqvae", codebook_size=NUM_ITEMS, epochs=1, lr=1e-6)
    _, metrics, meta = train(make_model(config), config, embeddings_of(folder, far_apart))
    assert metrics["collision_rate"] == 0.0
    assert meta["codebook_sizes"] == [NUM_ITEMS] * 3
    assert meta["disambiguation_level"] is None


def test_the_published_codes_are_those_of_the_best_checkpoint(make_config, make_model, train, folder, xs):
    config = make_config("rqvae", epochs=6, lr=0.05, select_mode="max")  # the worst loss is an early one
    run, metrics, _ = train(make_model(config), config, embeddings_of(folder, xs))
    checkpoints = Checkpoints(run.checkpoints, run.command)
    best, last = make_model(config).eval(), make_model(config).eval()
    best.load_state_dict(checkpoints.load_best()["model"])
    last.load_state_dict(checkpoints.load_newest()["model"])
    codes, _ = load_codes(folder, "q", "td", None)
    records = [json.loads(line)["metrics"]["loss_total"] for line in run.metrics.read_text().splitlines()]
    assert records.index(max(records)) < 5
    assert metrics["loss_total"] == pytest.approx(max(records))
    assert codes[:, :3].tolist() == best.get_codes(xs).tolist() != last.get_codes(xs).tolist()


@pytest.mark.slow
def test_training_is_a_function_of_the_seed(make_config, make_model, train, folder, xs, tmp_path):
    config = make_config("rqvae")
    _, first, _ = train(make_model(config), config, embeddings_of(folder, xs), "one command")
    codes = load_codes(folder, "q", "td", None)[0]
    (tmp_path / "runs").rename(tmp_path / "other_runs")
    _, second, _ = train(make_model(config), config, embeddings_of(folder, xs), "one command")
    assert first == second
    assert np.array_equal(codes, load_codes(folder, "q", "td", None)[0])


@pytest.mark.slow
def test_a_run_with_damaged_checkpoints_starts_again(make_config, make_model, train, folder, xs, tmp_path):
    config = make_config("rqvae")
    run, first, _ = train(make_model(config), config, embeddings_of(folder, xs))
    for path in run.checkpoints.glob("step-*.safetensors"):
        path.write_bytes(b"\0" * path.stat().st_size)
    _, second, _ = train(make_model(config), config, embeddings_of(folder, xs))
    assert second == first


def test_the_trainer_accepts_a_fitted_quantizer(plain_config, train, folder, xs):
    model = Signs(plain_config.for_model(), input_size=WIDTH)
    run, metrics, meta = train(model, plain_config, embeddings_of(folder, xs))
    codes, _ = load_codes(folder, "q", "td", None)
    assert codes[:, :WIDTH].tolist() == (xs.numpy() > np.median(np.sort(xs, axis=0)[:-1], axis=0)).astype(int).tolist()
    assert meta["codebook_sizes"][:WIDTH] == [2] * WIDTH  # inferred from the codes
    assert metrics["utilization"] == [1.0] * WIDTH
    assert metrics["reconstruction_error"] == 0.0
    assert (run.checkpoints / "best.safetensors").exists()


def test_the_trainer_accepts_a_quantizer_without_embedding(plain_config, train, folder):
    embeddings = Embeddings.load(folder, Atomic.embedding_suffixes({}, "td"))
    _, metrics, meta = train(Atomic(plain_config.for_model(), input_size=1), plain_config, embeddings)
    codes, _ = load_codes(folder, "q", "td", None)
    assert codes.tolist() == [[item // 2, item % 2] for item in range(NUM_ITEMS)]
    assert meta["codebook_sizes"] == [NUM_ITEMS // 2 + 1, 2]
    assert metrics["largest_bucket"] == 2


def ids(folder: DatasetFolder) -> tuple[np.ndarray, dict]:
    return load_codes(folder, "q", "td", None, distinct=False)


def test_shared_codes_are_published_but_refused_by_recommenders(make_config, make_model, train, folder, xs):
    config = make_config("rqvae", num_levels=1)
    config["common"]["disambiguation"] = "none"
    _, metrics, meta = train(make_model(config), config, embeddings_of(folder, xs), "a command --disambiguation none")
    assert ids(folder)[0].shape == (NUM_ITEMS, 1)
    assert (meta["disambiguation"], meta["disambiguation_level"], meta["codebook_sizes"]) == ("none", None, [4])
    shared = 1 - len(np.unique(ids(folder)[0])) / NUM_ITEMS
    assert meta["collision_rate_before"] == meta["collision_rate_after"] == metrics["collision_rate"] == shared
    with refused(ArtifactError, folder.codes("q", "td", None)) as raised:
        load_codes(folder, "q", "td", None)
    assert raised.value.fix == "a command --disambiguation extra_level"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rqvae", "vqvae", "rvq", "rkmeans", "pq", "fsq"])
def test_reassigned_codes_are_distinct_without_an_extra_level(name, make_config, make_model, train, folder, xs):
    levels = 1 if name == "vqvae" else 2
    config = make_config(name, num_levels=levels, codebook_size=NUM_ITEMS, num_values="[8, 5]", epochs=1)
    config["common"]["disambiguation"] = "reassign"
    rows = xs.repeat(2, 1)[:NUM_ITEMS] if name != "pq" else xs
    rows[1::2] = rows[::2]  # each vector belongs to two items
    _, metrics, meta = train(make_model(config), config, embeddings_of(folder, rows))
    codes, _ = load_codes(folder, "q", "td", None)
    assert codes.shape == (NUM_ITEMS, levels)
    assert metrics["collision_rate"] >= 0.5
    assert (meta["disambiguation"], meta["disambiguation_level"]) == ("reassign", None)
    assert meta["codebook_sizes"] == [NUM_ITEMS] * levels
    assert (meta["collision_rate_before"], meta["collision_rate_after"]) == (metrics["collision_rate"], 0.0)


@pytest.mark.parametrize(("name", "method", "level"), [
    ("pq", "reassign", None), ("opq", "reassign", None), ("rkmeans", "extra_level", 2)])
def test_by_default_only_codes_without_order_are_reassigned(name, method, level, make_config, make_model, train, folder,
                                                            xs):
    config = make_config(name, num_levels=2, codebook_size=NUM_ITEMS // 2)
    rows = xs.clone()
    rows[1] = rows[0]
    _, _, meta = train(make_model(config), config, embeddings_of(folder, rows))
    assert (meta["disambiguation"], meta["disambiguation_level"]) == (method, level)
    assert meta["collision_rate_before"] > meta["collision_rate_after"] == 0


def test_without_distances_reassign_uses_the_embedding_directions(plain_config, train, folder, xs):
    plain_config["common"]["disambiguation"] = "reassign"
    model = Spacious(plain_config.for_model(), input_size=1)
    directions = torch.nn.functional.normalize(xs).numpy()
    train(model, plain_config, Embeddings.load(folder, []), reference=EvaluationData(directions, None))
    codes, _ = load_codes(folder, "q", "td", None)
    assert sorted(codes[:, 0]) == list(range(NUM_ITEMS))
    kept = codes[:, 0] == np.arange(NUM_ITEMS) // 2
    assert (kept[::2] ^ kept[1::2]).all()  # one of each two


def test_a_level_too_small_to_reassign_is_refused(make_config, make_model, train, folder, xs):
    config = make_config("vqvae", codebook_size=16, epochs=1)
    config["common"]["disambiguation"] = "reassign"
    with refused(ConfigError, "common.disambiguation", names=[NUM_ITEMS, 16],
                 fix=[f"--codebook_size {NUM_ITEMS}", "--disambiguation extra_level"]):
        train(make_model(config), config, embeddings_of(folder, xs))
    assert not folder.codes("q", "td", None).exists()


class Poisoned(RQVAE):
    """Its loss is not a number at the given training step; it remembers that batch."""

    bad_step, num_steps = 5, 0

    def compute_loss(self, forward_outputs, original_xs):
        losses = super().compute_loss(forward_outputs, original_xs)
        if self.training:
            self.num_steps += 1
        if self.num_steps != self.bad_step:
            return losses
        self.batch = original_xs
        return {name: loss * math.nan for name, loss in losses.items()}


@pytest.mark.parametrize("seconds", [0, 3600], ids=["saving at every step", "saving at the end"])
def test_a_nonfinite_loss_names_its_batch_and_publishes_nothing(make_config, train, folder, xs, tmp_path, seconds):
    config = make_config("rqvae", checkpoint_seconds=seconds)  # three steps an epoch
    model = Poisoned(config.for_model(num_items=NUM_ITEMS), input_size=WIDTH)
    with refused(TrainingError, names=["loss_total", "nan", "not_finite.json"], fix=["--lr"]) as raised:
        train(model, config, embeddings_of(folder, xs))
    assert numbers(raised.value.what) == ["2", "2"]  # epoch and step
    [path] = tmp_path.glob("runs/*/not_finite.json")
    assert path.parent == raised.value.where
    content = json.loads(path.read_text())
    assert (content["epoch"], content["step"]) == (2, 2)
    assert torch.equal(xs[content["batch"]], model.batch)
    checkpoints = Checkpoints(path.parent / "checkpoints", "")
    kept = [checkpoints.load_best()] + ([checkpoints.load_newest()] if seconds == 0 else [])
    assert all(tensor.isfinite().all() for state in kept for tensor in state["model"].values())
    if seconds == 0:
        assert (kept[1]["epoch"], kept[1]["index"]) == (1, 1)  # the step before
    assert not folder.codes("q", "td", None).exists()
    assert not (path.parent / "finished.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "kind"), [
    (lambda path: path.unlink(), DataError), (lambda path: path.write_bytes(b"\0" * 100), ArtifactError)],
    ids=["removed", "overwritten"])
@pytest.mark.parametrize("name", ["rqvae", "pq"])
def test_without_its_best_checkpoint_a_run_publishes_nothing(name, make_config, make_model, train, folder, xs,
                                                             monkeypatch, damage, kind, tmp_path):
    save_best = Checkpoints.save_best

    def save_and_damage(checkpoints, state):
        save_best(checkpoints, state)
        damage(checkpoints.best)

    monkeypatch.setattr(Checkpoints, "save_best", save_and_damage)
    config = make_config(name)
    with refused(kind) as raised:
        train(make_model(config), config, embeddings_of(folder, xs))
    [checkpoints] = tmp_path.glob("runs/*/checkpoints")
    assert raised.value.where == checkpoints / "best.safetensors"
    assert raised.value.fix == "a command --force"
    assert not folder.codes("q", "td", None).exists()


@pytest.mark.parametrize("metric", ["reconstruction_eror", "utilization", "largest_bucket", ""])
def test_a_wrong_select_by_is_refused_before_training(make_config, make_model, train, folder, xs, monkeypatch, metric):
    monkeypatch.setattr(QuantizerTask, "step", lambda *args: pytest.fail("a step was taken"))
    config = make_config("rqvae", select_by=repr(metric))
    suggested = ["'reconstruction_error'"] if metric == "reconstruction_eror" else []
    with refused(ConfigError, "--rqvae.training_params.select_by", names=[repr(metric), *suggested]):
        train(make_model(config), config, embeddings_of(folder, xs))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["recon_loss", "collision_rate", "behavioral_coherence"])
def test_every_scalar_metric_may_select(make_config, make_model, train, folder, xs, metric):
    config = make_config("rqvae", select_by=metric, epochs=2)
    pairs = np.column_stack([np.arange(NUM_ITEMS - 1), np.arange(1, NUM_ITEMS)])
    reference = EvaluationData(None, pairs)
    run, metrics, _ = train(make_model(config), config, embeddings_of(folder, xs), reference=reference)
    records = [json.loads(line)["metrics"][metric] for line in run.metrics.read_text().splitlines()]
    assert metrics[metric] == pytest.approx(min(records))


def outcome(folder: DatasetFolder, run: Run) -> tuple[bytes, ...]:
    return (folder.codes("q", "td", None).read_bytes(), (run.checkpoints / "best.safetensors").read_bytes(),
            run.metrics.read_bytes())


def test_moving_average_codebooks_train_without_an_optimizer(make_config, make_model, train, folder, xs):
    config = make_config("rvq", epochs=6, start="random", restart_dead="false")
    reference = EvaluationData(None, None)
    assert QuantizerTask(make_model(config), xs, config.training_params, 0, "rvq", reference).descent.optimizer is None
    run, _, _ = train(make_model(config), config, embeddings_of(folder, xs))
    losses = [json.loads(line)["metrics"]["loss_total"] for line in run.metrics.read_text().splitlines()]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stop"), [("rvq", 1), ("rvq", 5), ("rqvae", 5), ("fsq", 9), ("rqvae", "evaluation")])
def test_an_interrupted_run_ends_with_the_same_bytes(make_config, make_model, train, folder, xs, tmp_path, monkeypatch,
                                                     name, stop):
    config = make_config(name)  # nine steps
    run, _, _ = train(make_model(config), config, embeddings_of(folder, xs))
    undisturbed = outcome(folder, run)
    (tmp_path / "runs").rename(tmp_path / "other_runs")
    take_step, measure = QuantizerTask.step, QuantizerTask.evaluate

    def step_and_stop(task, epoch, index):
        if epoch * task.num_steps + index + 1 == stop:
            stop_request.signal_number = signal.SIGTERM
        return take_step(task, epoch, index)

    def evaluate_and_stop(task):
        if stop == "evaluation":  # the state is saved before dead codewords restart
            stop_request.signal_number = signal.SIGTERM
        return measure(task)

    with monkeypatch.context() as patch:
        patch.setattr(stop_request, "signal_number", 0)
        patch.setattr(QuantizerTask, "step", step_and_stop)
        patch.setattr(QuantizerTask, "evaluate", evaluate_and_stop)
        with pytest.raises(Interrupted):
            train(make_model(config), config, embeddings_of(folder, xs))
    torch.manual_seed(99)
    run, _, _ = train(make_model(config), config, embeddings_of(folder, xs))
    assert outcome(folder, run) == undisturbed


def identical(xs: torch.Tensor) -> torch.Tensor:
    return torch.full_like(xs, 0.1)


def rank_one(xs: torch.Tensor) -> torch.Tensor:
    return xs[:, :1] * torch.linspace(-1, 1, xs.shape[1])


def mostly_duplicates(xs: torch.Tensor) -> torch.Tensor:
    return xs[torch.arange(len(xs)).clamp(max=9)]  # ten vectors; 31 items share one of them


@pytest.mark.slow
@pytest.mark.parametrize("rows", [identical, rank_one, mostly_duplicates])
@pytest.mark.parametrize(("name", "standardize"), [
    ("rqvae", "false"), ("rvq", "true"), ("rkmeans", "false"), ("pq", "false"), ("fsq", "true")])
def test_degenerate_embeddings_give_finite_metrics_and_distinct_ids(make_config, make_model, train, folder, xs, name,
                                                                    rows, standardize):
    config = make_config(name, standardize=standardize, epochs=2)
    run, metrics, _ = train(make_model(config), config, embeddings_of(folder, rows(xs)))
    codes, meta = load_codes(folder, "q", "td", None)  # refuses IDs that are not distinct
    assert len(codes) == NUM_ITEMS
    assert meta["collision_rate_after"] == 0
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
    assert "NaN" not in json.dumps([metrics, meta, run.metrics.read_text() if run.metrics.exists() else ""])
    if rows is identical:
        assert metrics["largest_bucket"] == NUM_ITEMS
        assert metrics["explained_variance"] is None
        assert max(metrics["utilization"]) <= 0.25
        assert codes[:, -1].tolist() == list(range(NUM_ITEMS))
    if rows is mostly_duplicates:
        assert metrics["largest_bucket"] >= 31
        assert meta["codebook_sizes"][-1] == metrics["largest_bucket"]


def test_codes_are_published_if_their_meta_names_the_run(make_config, make_model, train, folder, xs):
    config, path = make_config("pq"), folder.codes("q", "td", None)
    assert not is_published(path, "abc")
    train(make_model(config), config, embeddings_of(folder, xs))
    assert not is_published(path, "abc")
    path.with_name(path.name + ".meta.json").write_text("{")
    assert not is_published(path, "abc")


@pytest.mark.parametrize(("num_items", "steps_of_epoch"), [(40, 2), (3, 2), (4097, 3)])
def test_a_small_catalogue_has_smaller_batches(make_config, make_model, num_items, steps_of_epoch):
    config = make_config("rqvae", batch_size=2048, min_steps_per_epoch=2, codebook_size=2)
    xs = torch.randn(num_items, WIDTH)
    task = QuantizerTask(make_model(config, num_items), xs, config.training_params, 0, "q", EvaluationData(None, None))
    assert task.num_steps == steps_of_epoch
    assert sorted(n for index in range(task.num_steps) for n in task.batch_numbers(0, index)) == list(range(num_items))


def test_a_model_is_maintained_every_few_steps_across_epochs(make_config, make_model, xs, monkeypatch):
    config = make_config("rqvae", batch_size=4)  # ten steps of 40 items
    model, seen = make_model(config), []
    task = QuantizerTask(model, xs, config.training_params, 0, "q", EvaluationData(None, None))
    monkeypatch.setattr("quantization.trainer.MAINTAIN_EVERY", 4)
    for hook in ("maintain", "end_epoch"):
        monkeypatch.setattr(model, hook, lambda xs, generator, hook=hook: seen.append((hook, epoch, index)))
    for epoch in range(2):
        for index in range(task.num_steps):
            task.step(epoch, index)
        task.end_epoch(epoch)
    assert seen == [("maintain", 0, 4), ("maintain", 0, 8), ("end_epoch", 0, 9), ("maintain", 1, 2),
                    ("maintain", 1, 6), ("end_epoch", 1, 9)]


def test_a_live_codeword_missing_from_the_last_batch_stays(make_config, make_model, train, folder, xs, monkeypatch):
    monkeypatch.setattr("quantization.trainer.MAINTAIN_EVERY", 3)
    config = make_config("rqvae", batch_size=13, num_levels=1, codebook_size=3, lr=1e-9, epochs=2)  # 13 + 13 + 13 + 1
    three_kinds = xs + 100 * torch.eye(WIDTH)[torch.arange(NUM_ITEMS) % 3]
    model = make_model(config)
    codebook, codewords = model.quantizer.codebooks[0], []
    maintain = model.maintain

    def maintain_and_note(xs, generator):
        codewords.append(codebook.codewords.detach().clone())
        maintain(xs, generator)

    monkeypatch.setattr(model, "maintain", maintain_and_note)
    _, metrics, _ = train(model, config, embeddings_of(folder, three_kinds))
    assert torch.allclose(torch.stack([*codewords, codebook.codewords.detach()]), codewords[0], atol=1e-4)
    assert metrics["utilization"] == [1.0]


def test_a_dead_codeword_restarts_after_the_evaluation(make_config, make_model, train, folder, xs, monkeypatch):
    """The published model is the first one with its dead codeword, as it was evaluated."""
    config = make_config("rqvae", num_levels=1, codebook_size=4, lr=1e-9, epochs=2, select_by="collision_rate",
                         select_mode="max")
    model, evaluated = make_model(config), []
    initialize, measure = model.initialize, QuantizerTask.evaluate

    def initialize_with_a_dead_codeword(xs, generator):
        initialize(xs, generator)
        with torch.no_grad():
            model.quantizer.codebooks[0].codewords[2] = 100.0

    def evaluate_and_note(task):
        evaluated.append(model.get_codes(xs)[:, 0].tolist())
        return measure(task)

    monkeypatch.setattr(model, "initialize", initialize_with_a_dead_codeword)
    monkeypatch.setattr(QuantizerTask, "evaluate", evaluate_and_note)
    train(model, config, embeddings_of(folder, xs))
    assert [len(set(codes)) for codes in evaluated] == [3, 4]
    assert ids(folder)[0][:, 0].tolist() == evaluated[0]
