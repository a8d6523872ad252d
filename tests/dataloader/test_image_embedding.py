"""Step 4 with a tiny CLIP of random weights: vectors against transformers itself, gaps, faults and models."""

import logging
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.artifacts import load_mask, load_meta
from common.errors import ArtifactError, ConfigError, DataError, ResourceError
from common.publishing import file_sha256
from dataloader.embeddings import clip, pictures
from dataloader.figures import fetch_figures, load_figures
from dataloader.image_embedding import embed
from dataloader.options import FigureOptions
from tests.dataloader.dataset import add_item, write_dataset
from tests.dataloader.helpers import closed_port
from tests.dataloader.image_server import ImageServer, encoded, picture, png
from tests.dataloader.image_shop import COMMAND, count_readings, embedded, oracle, shop
from tests.dataloader.tiny_clip import DIM, write_clip, write_hub_clip, write_saved_clip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def server():
    server = ImageServer()
    yield server
    server.close()


def test_the_vectors_are_those_that_transformers_gives_for_the_same_pictures(tmp_path, server, model):
    sizes = [(48, 40), (40, 48), (32, 32), (200, 31), (31, 200), (500, 400)]
    drawn = [picture(number, *size) for number, size in enumerate(sizes)]
    vectors = embedded(shop(tmp_path, server, model, [encoded(image) for image in drawn]))
    assert (vectors.dtype, vectors.shape) == (np.float32, (6, DIM))
    np.testing.assert_allclose(vectors, oracle(model, drawn), atol=2e-6)
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2) + 9 * np.eye(6)
    assert distances.min() > 0.1  # or else the comparison would show nothing


def test_pictures_of_other_kinds_are_seen_as_a_viewer_shows_them(tmp_path, server, model):
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


def test_a_cmyk_picture_is_near_the_same_one_in_rgb(tmp_path, server, model):
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


def test_a_vector_is_the_same_alone_and_beside_others(tmp_path, server, model):
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
    assert "raw-3: not an image" in caplog.text
    assert "raw-4: placeholder (2 x 2 pixels)" in caplog.text
    assert "3 items have no image vector of their own" in caplog.text


def test_missing_images_can_be_an_error(tmp_path, server, model):
    options = shop(tmp_path, server, model, [png(0), None, b"no image"])
    options = options._replace(missing="error")
    with pytest.raises(DataError) as error:
        embed(options, COMMAND)
    assert error.value.exit_code == 3
    assert error.value.what == "2 items have no image"
    assert error.value.why == "raw-1 (no address), raw-2 (not an image)"
    assert not options.folder.embeddings("image").exists()


def test_placeholders_alone_are_no_images(tmp_path, server, model):
    with pytest.raises(DataError, match="no item has an image"):
        embed(shop(tmp_path, server, model, [png(0, 3, 3), None]), COMMAND)


def test_without_step_1_its_command_is_named(tmp_path, model):
    options = write_dataset(tmp_path / "data", ["text"], "--image_model", str(model)).image
    with pytest.raises(DataError) as error:
        embed(options, COMMAND)
    assert error.value.exit_code == 3
    assert error.value.fix == f"bash dataloader/1_load_figure.sh --dataset Baby --data_root {tmp_path / 'data'}"


def test_images_of_other_items_are_refused_until_step_1_has_run_again(tmp_path, server, model):
    options = shop(tmp_path, server, model, [png(0), png(1)])
    add_item(options, "one more")
    with pytest.raises(ArtifactError, match="figures.parquet: is stale") as error:
        embed(options, COMMAND)
    assert "bash dataloader/1_load_figure.sh" in error.value.fix


def test_the_artifact_records_what_it_was_made_from(tmp_path, server, model):
    options = shop(tmp_path, server, model, [png(0), None])
    embed(options, COMMAND)
    meta = load_meta(options.folder.embeddings("image"), "")
    assert meta["inputs"] == {path.name: file_sha256(path) for path in (
        options.folder.items, options.folder.figures, options.folder.mask("image"))}
    assert (meta["dim"], meta["num_missing"], meta["command"]) == (DIM, 1, COMMAND)
    assert meta["settings"]["image_model"] == "clip"
    assert meta["encoder"]["encoder"] == "clip"


def test_the_second_run_reuses_the_vectors_until_model_or_images_change(tmp_path, server, model, caplog):
    caplog.set_level(logging.INFO)
    bodies = [png(0), png(1)]
    options = shop(tmp_path, server, model, bodies)
    first = embedded(options)
    embed(options, COMMAND)
    assert "embed: reusing" in caplog.text
    other = embedded(shop(tmp_path, server, write_clip(tmp_path / "other", seed=1), bodies))
    assert np.abs(other - first).max() > 0.1
    changed = embedded(shop(tmp_path, server, model, [*bodies, png(2)]))
    np.testing.assert_array_equal(changed[:2], first)
    assert changed.shape == (3, DIM)


def test_images_with_the_same_bytes_are_encoded_once_and_known_ones_not_at_all(tmp_path, server, model, monkeypatch):
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


def test_never_more_than_two_batches_of_pictures_are_in_memory(tmp_path, server, model, monkeypatch):
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


def test_where_memory_runs_out_the_batches_are_halved(tmp_path, server, model, monkeypatch, caplog):
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
    assert "not enough memory for 32" in caplog.text


def failing_encode(monkeypatch, error: Exception | None) -> None:
    """A model that fails, or without an error gives vectors that are no use for pictures that are black."""
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
def test_a_batch_that_fails_is_an_error_with_the_raw_ids_and_nothing_is_published(tmp_path, server, model, monkeypatch,
                                                                                 fault, expected):
    failing_encode(monkeypatch, fault)
    options = shop(tmp_path, server, model, [png(0), encoded(Image.new("RGB", (32, 32)))])
    with pytest.raises(expected) as error:
        embed(options, COMMAND)
    assert "raw-1" in str(error.value)
    assert "images" in error.value.what
    assert "--image_model" in error.value.fix
    if expected is DataError and fault is not None:
        assert str(fault) in error.value.why
    assert not options.folder.embeddings("image").exists()
    assert not options.folder.mask("image").exists()


@pytest.mark.parametrize("damage", ["cut", "gone", "exchanged"])
def test_a_file_that_changed_since_it_was_fetched_is_named_with_its_item(tmp_path, server, model, damage):
    options = shop(tmp_path, server, model, [png(0), png(1)])
    path = options.folder.images / load_figures(options.folder).file[1]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(png(1)[:-50] if damage == "cut" else png(7))
    with pytest.raises(DataError) as error:
        embed(options, COMMAND)
    assert error.value.where == path
    assert "item raw-1" in error.value.what
    assert "1_load_figure.sh --dataset Baby" in error.value.fix
    assert not options.folder.embeddings("image").exists()
    fetch_figures(FigureOptions(options.folder, 1000, 10, "mask", force=True), "")  # as the error says
    assert embedded(options).shape == (2, DIM)


def test_a_text_model_is_refused(tmp_path, server, model):
    text_model = tmp_path / "text model"
    write_text_model(text_model)
    options = shop(tmp_path, server, text_model, [png(0)])
    with pytest.raises(ConfigError, match="--image_model .*text model: is no model for images") as error:
        embed(options, COMMAND)
    assert error.value.exit_code == 2


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
    with pytest.raises(ConfigError, match="--image_model .*empty: cannot be loaded"):
        embed(options, COMMAND)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """The empty cache of a hub that cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_default_model_comes_from_the_hub_s_cache(tmp_path, server, model, hub):
    folder = hub / "models--sentence-transformers--clip-ViT-B-32"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    write_hub_clip(folder / "snapshots" / ("0" * 40))
    options = shop(tmp_path, server, Path("clip-ViT-B-32"), [png(0), png(1)])
    np.testing.assert_allclose(embedded(options), oracle(model, [picture(0), picture(1)]), atol=2e-6)
    assert load_meta(options.folder.embeddings("image"), "")["settings"]["image_model"] == "clip-ViT-B-32"


def test_a_model_that_is_nowhere_is_an_error_that_says_where_it_was_looked_for_and_what_to_do(tmp_path, server, hub):
    options = shop(tmp_path, server, Path("clip-ViT-B-32"), [png(0)])
    with pytest.raises(ResourceError) as error:
        embed(options, COMMAND)
    assert error.value.exit_code == 5
    for words in ("--image_model clip-ViT-B-32", "sentence-transformers/clip-ViT-B-32", str(hub), "cannot connect",
                  "--image_model DIR"):
        assert words in str(error.value)
    assert "tfidf" not in str(error.value)  # which is of no help with images


def test_without_pillow_its_command_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install -r requirements-images.txt"):
        embed(write_dataset(tmp_path / "data", ["text"], "--image_model", str(model)).image, COMMAND)
