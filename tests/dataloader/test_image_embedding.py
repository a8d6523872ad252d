"""Step 4 with a tiny CLIP of random weights: vectors compared with transformers, missing images, faults, models."""

import logging
import weakref
from pathlib import Path

import duckdb
import numpy as np
import pytest
from PIL import Image

from common.artifacts import load_mask, load_meta
from common.errors import ArtifactError, ConfigError, DataError, ResourceError
from common.publishing import file_sha256, write_meta
from dataloader.embeddings import clip, image_decoding
from dataloader.image_embedding import embed
from dataloader.images import fetch_images, load_image_table
from dataloader.options import ImageFetchOptions
from tests.dataloader.dataset import add_item, write_dataset
from tests.dataloader.helpers import closed_port, logged, mentions, table
from tests.dataloader.image_server import ImageServer, encoded, picture, png
from tests.dataloader.image_shop import COMMAND, count_readings, embedded, oracle, shop
from tests.dataloader.processing import version
from tests.dataloader.tiny_clip import DIM, write_clip, write_hub_clip, write_saved_clip
from tests.errors import refused

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def server():
    server = ImageServer()
    yield server
    server.close()


def test_the_vectors_are_those_of_transformers(tmp_path, server, model):
    sizes = [(48, 40), (40, 48), (32, 32), (200, 31), (31, 200), (500, 400)]
    drawn = [picture(number, *size) for number, size in enumerate(sizes)]
    vectors = embedded(shop(tmp_path, server, model, [encoded(image) for image in drawn]))
    assert (vectors.dtype, vectors.shape) == (np.float32, (6, DIM))
    np.testing.assert_allclose(vectors, oracle(model, drawn), atol=2e-6)
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2) + 9 * np.eye(6)
    assert distances.min() > 0.1  # or else a swapped row would pass


def test_other_image_formats_are_read_as_a_viewer_shows_them(tmp_path, server, model):
    red, blue = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (40, 40), "blue")
    red.paste(blue.crop((0, 0, 20, 40)), (0, 0))  # blue on the left, red on the right
    half_gone = red.convert("RGBA")
    half_gone.paste((0, 0, 0, 0), (0, 0, 20, 40))
    white_red = Image.new("RGB", (40, 40), "white")
    white_red.paste((255, 0, 0), (20, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 3
    upside_down = encoded(red.rotate(180), "PNG", exif=exif)
    bodies = [encoded(half_gone), encoded(red.quantize(4)), upside_down,
              encoded(red.quantize(4), "GIF", save_all=True, append_images=[blue.quantize(4)]),
              encoded(red.convert("L"))]
    vectors = embedded(shop(tmp_path, server, model, bodies))
    seen = [white_red, red, red, red, red.convert("L").convert("RGB")]
    np.testing.assert_allclose(vectors, oracle(model, seen), atol=2e-6)


def test_a_cmyk_image_is_near_the_same_one_in_rgb(tmp_path, server, model):
    image = picture(3, 64, 64)
    bodies = [encoded(image.convert("CMYK"), "JPEG", quality=100), encoded(image), encoded(picture(4, 64, 64))]
    same, original, other = embedded(shop(tmp_path, server, model, bodies))
    assert np.linalg.norm(same - original) < 0.2 * np.linalg.norm(other - original)


@pytest.mark.parametrize("layout", ["hub", "saved"])
def test_every_layout_of_a_model_folder_gives_the_same_vectors(tmp_path, server, model, layout):
    other = (write_hub_clip(tmp_path / "hub") if layout == "hub" else write_saved_clip(tmp_path / "saved", model))
    bodies = [png(number) for number in range(3)]
    np.testing.assert_array_equal(embedded(shop(tmp_path / "a", server, model, bodies)),
                                  embedded(shop(tmp_path / "b", server, other, bodies)))


def test_a_vector_is_the_same_alone_and_in_a_batch(tmp_path, server, model):
    bodies = [png(number, 40 + number, 50) for number in range(40)]  # a batch of 32, and one of 8
    together = embedded(shop(tmp_path / "together", server, model, bodies))
    alone = embedded(shop(tmp_path / "alone", server, model, bodies[17:18]))
    np.testing.assert_allclose(together[17], alone[0], atol=1e-6 * np.abs(alone).max())


def test_items_without_an_image_get_the_mean_and_are_marked(tmp_path, server, model, caplog):
    caplog.set_level(logging.INFO)
    bodies = [png(0), None, png(1), b"no image", png(2, 2, 2)]
    options = shop(tmp_path, server, model, bodies)
    vectors = embedded(options)
    assert load_mask(options.folder, "image").tolist() == [True, False, True, False, False]
    expected = oracle(model, [picture(0), picture(1)])
    np.testing.assert_allclose(vectors[[0, 2]], expected, atol=2e-6)
    np.testing.assert_allclose(vectors[[1, 3, 4]], [expected.mean(axis=0)] * 3, atol=2e-6)
    status = dict(table(options.folder.image_table, "raw_id, status"))
    assert logged(caplog, "raw-3", status["raw-3"])
    assert logged(caplog, "raw-4", status["raw-4"], "2 x 2")
    assert logged(caplog, options.target.path, 3)


def test_missing_images_can_be_an_error(tmp_path, server, model):
    options = shop(tmp_path, server, model, [None, b"no image", png(0)])._replace(missing="error")
    status = [status for status, in table(options.folder.image_table, "status")]
    with refused(DataError, options.folder.image_table, fix=["1_load_figure.sh", "--missing_images mask"]) as raised:
        embed(options, COMMAND)
    assert mentions(f"{raised.value.what} {raised.value.why}", 2, "raw-0", status[0], "raw-1", status[1])
    assert "raw-2" not in str(raised.value)
    assert not options.target.path.exists()


def test_placeholders_do_not_count_as_images(tmp_path, server, model):
    options = shop(tmp_path, server, model, [png(0, 3, 3), None])
    with refused(DataError, options.folder.image_table, fix=["--min_image_side"]):
        embed(options, COMMAND)


def test_missing_step_1_is_named_by_its_command(tmp_path, model):
    options = write_dataset(tmp_path / "data", ["text"], "--image_model", str(model)).image
    with refused(DataError, options.folder.image_table) as raised:
        embed(options, COMMAND)
    assert raised.value.fix == f"bash dataloader/1_load_figure.sh --dataset Baby --data_root {tmp_path / 'data'}"


def test_images_of_an_older_catalogue_are_refused(tmp_path, server, model):
    options = shop(tmp_path, server, model, [png(0), png(1)])
    add_item(options, "one more")
    with refused(ArtifactError, options.folder.image_table, names=["items.parquet"],
                 fix=["bash dataloader/1_load_figure.sh --force"]):
        embed(options, COMMAND)


def test_the_artifact_records_its_inputs_and_settings(tmp_path, server, model):
    options = shop(tmp_path, server, model, [png(0), None])
    embed(options, COMMAND)
    meta = load_meta(options.folder.embeddings("image"), "")
    assert meta["inputs"] == {path.name: file_sha256(path) for path in (
        options.folder.items, options.folder.image_table, options.folder.mask("image"))}
    assert (meta["dim"], meta["num_missing"], meta["command"]) == (DIM, 1, COMMAND)
    assert meta["settings"]["image_model"] == "clip"
    assert meta["encoder"]["encoder"] == "clip"


def test_vectors_are_reused_until_model_or_images_change(tmp_path, server, model):
    bodies = [png(0), png(1)]
    options = shop(tmp_path, server, model, bodies)
    first, written = embedded(options), version(options.target.path)
    embed(options, COMMAND)
    assert version(options.target.path) == written
    other = embedded(shop(tmp_path, server, write_clip(tmp_path / "other", seed=1), bodies))
    assert np.abs(other - first).max() > 0.1
    changed = embedded(shop(tmp_path, server, model, [*bodies, png(2)]))
    np.testing.assert_array_equal(changed[:2], first)
    assert changed.shape == (3, DIM)


def test_images_with_the_same_bytes_are_encoded_once(tmp_path, server, model, monkeypatch):
    read = count_readings(monkeypatch)
    options = shop(tmp_path, server, model, [png(0), png(1), png(0), png(0)])
    vectors = embedded(options)
    assert len(read) == 2
    np.testing.assert_array_equal(vectors[[2, 3]], vectors[[0, 0]])
    more = embedded(shop(tmp_path, server, model, [png(5), png(1), png(0)]))
    assert len(read) == 3
    np.testing.assert_array_equal(more[1:], vectors[[1, 0]])
    again = embedded(options._replace(force=True))
    np.testing.assert_allclose(again, more, atol=1e-5)  # other batches
    assert len(read) == 6


def test_two_runs_give_the_same_bytes(tmp_path, server, model):
    files = []
    for name in ("first", "second"):
        options = shop(tmp_path / name, server, model, [png(n) for n in range(40)])
        embed(options, COMMAND)
        files.append(options.folder.embeddings("image").read_bytes())
    assert files[0] == files[1]


def test_at_most_two_batches_of_images_are_in_memory(tmp_path, server, model, monkeypatch):
    living, counts, read = set(), [], clip._read

    def reading(sha256, source):
        image = read(sha256, source)
        living.add(sha256)
        weakref.finalize(image, living.discard, sha256)
        counts.append(len(living))
        return image

    monkeypatch.setattr(clip, "_read", reading)
    monkeypatch.setattr(clip, "BATCH", {"cpu": 4})
    embed(shop(tmp_path, server, model, [png(n) for n in range(40)]), COMMAND)
    assert len(counts) == 40
    assert 4 < max(counts) <= 8


def test_batches_are_halved_when_memory_runs_out(tmp_path, server, model, monkeypatch, caplog):
    from sentence_transformers import SentenceTransformer

    caplog.set_level(logging.INFO)
    bodies, encode, sizes = [png(n) for n in range(40)], SentenceTransformer.encode, []
    whole = embedded(shop(tmp_path / "whole", server, model, bodies))

    def short_of_memory(self, images, **options):
        sizes.append(len(images))
        if len(images) > 10:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return encode(self, images, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", short_of_memory)
    halved = embedded(shop(tmp_path / "halved", server, model, bodies))
    assert sizes[:4] == [32, 16, 8, 8]
    np.testing.assert_allclose(halved, whole, atol=1e-5)
    assert logged(caplog, 32, 16)


def failing_encode(monkeypatch, error: Exception | None) -> None:
    """Make the model fail; with None for the error, it returns zeros for black images."""
    from sentence_transformers import SentenceTransformer

    encode = SentenceTransformer.encode

    def fail(self, images, **options):
        if error is not None:
            raise error
        vectors = encode(self, images, **options)
        vectors[[np.asarray(image).max() == 0 for image in images]] = 0
        return vectors

    monkeypatch.setattr(SentenceTransformer, "encode", fail)


@pytest.mark.parametrize(("fault", "expected"), [
    (RuntimeError("a kernel failed"), DataError), (ValueError("bad shape"), DataError),
    (RuntimeError("CUDA out of memory"), ResourceError), (None, DataError)])
def test_a_failed_batch_names_the_raw_ids(tmp_path, server, model, monkeypatch, fault, expected):
    failing_encode(monkeypatch, fault)
    options = shop(tmp_path, server, model, [png(0), encoded(Image.new("RGB", (32, 32)))])
    with refused(expected, options.target.path, names=["raw-1"], fix=["--image_model"]) as raised:
        embed(options, COMMAND)
    if expected is DataError and fault is not None:
        assert str(fault) in raised.value.why
    assert not options.target.path.exists()
    assert not options.folder.mask("image").exists()


@pytest.mark.parametrize("query", ["* FROM t ORDER BY item LIMIT 1", "* REPLACE ('x' AS raw_id) FROM t",
                                   "* REPLACE (NULL AS file) FROM t", "* REPLACE (7 AS sha256) FROM t"])
def test_a_table_of_other_images_is_refused(tmp_path, server, model, query):
    options = shop(tmp_path, server, model, [png(0), png(1)])
    images, meta = options.folder.image_table, load_meta(options.folder.image_table, "")
    with duckdb.connect() as connection:
        connection.read_parquet(str(images)).create_view("t")
        connection.sql(f"SELECT {query}").write_parquet(str(tmp_path / "other"))
    (tmp_path / "other").replace(images)
    write_meta(images, {key: value for key, value in meta.items() if key not in ("sha256", "size")})
    with refused(ArtifactError, images, fix=["1_load_figure.sh"]):
        embed(options, COMMAND)


@pytest.mark.parametrize("damage", ["cut", "gone", "exchanged"])
def test_a_changed_image_file_is_named_with_its_item(tmp_path, server, model, damage):
    options = shop(tmp_path, server, model, [png(0), png(1)])
    path = options.folder.images / load_image_table(options.folder).file[1]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(png(1)[:-50] if damage == "cut" else png(7))
    with refused(DataError, path, names=["raw-1"], fix=["1_load_figure.sh --dataset Baby", "--force"]):
        embed(options, COMMAND)
    assert not options.target.path.exists()
    fetch_images(ImageFetchOptions(options.folder, 1000, 10, "mask", force=True), "")  # the fix of the error
    assert embedded(options).shape == (2, DIM)


def test_a_text_model_is_refused(tmp_path, server, model):
    text_model = tmp_path / "text model"
    write_text_model(text_model)
    options = shop(tmp_path, server, text_model, [png(0)])
    with refused(ConfigError, f"--image_model {text_model}", fix=["clip-ViT-B-32"]):
        embed(options, COMMAND)


def write_text_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    BertModel(BertConfig(vocab_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                         max_position_embeddings=8)).save_pretrained(folder)


def test_a_folder_without_a_model_is_refused(tmp_path, server):
    (tmp_path / "empty").mkdir()
    options = shop(tmp_path, server, tmp_path / "empty", [png(0)])
    with refused(ConfigError, f"--image_model {tmp_path / 'empty'}"):
        embed(options, COMMAND)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """The empty cache of a hub without a connection."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_default_model_comes_from_the_cache_of_the_hub(tmp_path, server, model, hub):
    folder = hub / "models--sentence-transformers--clip-ViT-B-32"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    write_hub_clip(folder / "snapshots" / ("0" * 40))
    options = shop(tmp_path, server, Path("clip-ViT-B-32"), [png(0), png(1)])
    np.testing.assert_allclose(embedded(options), oracle(model, [picture(0), picture(1)]), atol=2e-6)
    assert load_meta(options.folder.embeddings("image"), "")["settings"]["image_model"] == "clip-ViT-B-32"


def test_a_model_that_cannot_be_fetched_names_every_source(tmp_path, server, hub):
    from huggingface_hub import constants

    options, name = shop(tmp_path, server, Path("clip-ViT-B-32"), [png(0)]), "sentence-transformers/clip-ViT-B-32"
    with refused(ResourceError, "--image_model clip-ViT-B-32", names=[hub, f"{constants.ENDPOINT}/{name}"],
                 fix=[f"hf download {name} --local-dir DIR", "--image_model DIR"]) as raised:
        embed(options, COMMAND)
    assert "tfidf" not in str(raised.value)  # it embeds no images


def test_without_pillow_its_command_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setattr(image_decoding, "find_spec", lambda name: None)
    with refused(ConfigError, "pillow", fix=["pip install -r requirements-images.txt"]):
        embed(write_dataset(tmp_path / "data", ["text"], "--image_model", str(model)).image, COMMAND)
