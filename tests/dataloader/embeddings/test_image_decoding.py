"""Images of every kind, drawn here, as the image model receives them."""

import functools
import io
import random
import warnings

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError
from dataloader.embeddings import image_decoding
from dataloader.embeddings.image_decoding import BadImage, image_size, load_rgb, set_up_pillow
from tests.dataloader.image_server import HTML, encoded, picture
from tests.errors import refused

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def check_image(data: bytes) -> tuple[int, int]:
    return image_size(data, check=True)


@pytest.fixture(autouse=True)
def pillow():
    with warnings.catch_warnings():
        set_up_pillow()
        yield


def colours(data: bytes) -> np.ndarray:
    image = load_rgb(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def halves(mode: str, left, right) -> Image.Image:
    """20 x 10 pixels, the left half in one colour and the right half in another."""
    image = Image.new(mode, (20, 10), right)
    image.paste(left, (0, 0, 10, 10))
    return image


def two_colours(data: bytes) -> tuple[tuple, tuple]:
    """The colours in the middle of each half."""
    pixels = colours(data)
    return tuple(pixels[5, 5].tolist()), tuple(pixels[5, 15].tolist())


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_every_web_format_opens(form):
    data = encoded(picture(0), form)
    assert check_image(data) == image_size(data) == load_rgb(data).size == (48, 40)


def test_cmyk_keeps_its_colours():
    data = encoded(halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", quality=100)
    np.testing.assert_allclose(two_colours(data), (RED, BLUE), atol=12)


def test_grey_and_black_and_white_become_grey():
    assert two_colours(encoded(halves("L", 100, 200))) == ((100,) * 3, (200,) * 3)
    assert two_colours(encoded(halves("1", 0, 1))) == ((0,) * 3, WHITE)


def test_sixteen_bits_a_pixel_are_scaled():
    image = Image.fromarray(np.array([[0x4000] * 10 + [0xFF00] * 10] * 10, dtype=np.uint16))
    assert two_colours(encoded(image)) == ((0x40,) * 3, (0xFF,) * 3)


def test_a_palette_is_looked_up():
    assert two_colours(encoded(halves("RGB", RED, BLUE).quantize(4))) == (RED, BLUE)


def test_transparent_parts_become_white():
    half_red = (255, 127, 127)  # half of red, half of white
    assert two_colours(encoded(halves("RGBA", (255, 0, 0, 128), (0, 0, 255, 0)))) == (half_red, WHITE)
    assert two_colours(encoded(halves("LA", (0, 255), (0, 0)))) == ((0, 0, 0), WHITE)


def test_a_transparent_palette_entry_becomes_white():
    image = halves("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    assert two_colours(encoded(image, "GIF", transparency=1)) == (RED, WHITE)
    assert two_colours(encoded(image, "PNG", transparency=0)) == (WHITE, BLUE)


def test_a_transparent_colour_without_alpha_becomes_white():
    assert two_colours(encoded(halves("RGB", RED, BLUE), "PNG", transparency=BLUE)) == (RED, WHITE)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_used(form):
    first, second = halves("RGB", RED, BLUE), halves("RGB", BLUE, RED)
    options = {"lossless": True} if form == "WEBP" else {}
    assert two_colours(encoded(first, form, save_all=True, append_images=[second], **options)) == (RED, BLUE)


def test_an_image_rotated_by_a_camera_becomes_upright():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pixels = two_colours(encoded(halves("RGB", RED, BLUE), "JPEG", exif=exif, quality=100, subsampling=0))
    np.testing.assert_allclose(pixels, (BLUE, RED), atol=12)
    exif[0x0112] = 6  # lying on its side
    assert load_rgb(encoded(picture(0, 48, 40), "JPEG", exif=exif)).size == (40, 48)


@functools.cache
def bomb() -> bytes:
    """A few kilobytes that would unpack to 400 million pixels."""
    return encoded(Image.new("1", (20_000, 20_000)))


DAMAGED = {
    "empty": b"", "text": b"not here", "html": HTML, "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "jpeg cut": encoded(picture(0), "JPEG")[:-200], "png cut": encoded(picture(0))[:-200],
    "gif cut": encoded(picture(0), "GIF")[:-200], "webp cut": encoded(picture(0), "WEBP")[:-100],
    "bmp cut": encoded(picture(0), "BMP")[:-200], "head alone": encoded(picture(0))[:33],
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n",
    "tiff": encoded(picture(0), "TIFF"),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("read", [check_image, load_rgb])
def test_a_file_that_does_not_decode_is_not_an_image(data, read):
    with pytest.raises(BadImage) as error:
        read(data)
    assert error.value.status == "not an image"
    assert 0 < len(error.value.detail) <= 100
    assert "0x" not in error.value.detail  # no address in memory: the same file gives the same message


@pytest.mark.slow
@pytest.mark.parametrize("read", [image_size, check_image, load_rgb])
def test_a_small_file_with_huge_dimensions_is_refused(read):
    data = bomb()
    assert len(data) < 60_000
    with pytest.raises(BadImage) as error:
        read(data)
    assert error.value.status == "too large"


def test_the_limit_at_which_pillow_warns_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert check_image(encoded(Image.new("L", (40, 25)))) == (40, 25)
    with pytest.raises(BadImage) as error:
        check_image(encoded(Image.new("L", (40, 26))))
    assert error.value.status == "too large"


def test_damaged_bytes_raise_one_kind_of_error():
    rng = random.Random(0)
    samples = [encoded(picture(1), form) for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP")]
    num_refused = 0
    for _ in range(1500):
        data = bytearray(rng.choice(samples))
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(rng.choice((64, len(data))))] = rng.randrange(256)
        try:
            load_rgb(bytes(data))
        except BadImage:
            num_refused += 1
    assert 100 < num_refused < 1500


def test_a_large_image_shrinks_by_a_whole_factor(monkeypatch):
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 1200)
    assert load_rgb(encoded(picture(0, 40, 30))).size == (40, 30)
    assert load_rgb(encoded(picture(0, 80, 60))).size == (40, 30)
    assert two_colours(encoded(halves("RGBA", (*RED, 255), (*BLUE, 0)).resize((60, 30), 0))) == (RED, WHITE)
    paletted = halves("RGB", RED, BLUE).quantize(2).resize((60, 30), 0)
    pixels = colours(encoded(paletted))
    assert pixels.shape == (15, 30, 3)
    assert (pixels[7, 5].tolist(), pixels[7, 25].tolist()) == (list(RED), list(BLUE))


@pytest.mark.parametrize(("size", "kept"), [((2000, 20), (400, 20)), ((20, 2000), (20, 400)), ((400, 20), (400, 20))])
def test_the_middle_of_a_long_strip_is_kept(size, kept):
    image = Image.new("RGB", size, BLUE)
    middle = (size[0] // 2 - 5, size[1] // 2 - 5, size[0] // 2 + 5, size[1] // 2 + 5)
    image.paste(RED, middle)
    pixels = colours(encoded(image))
    assert pixels.shape == (kept[1], kept[0], 3)
    assert pixels[kept[1] // 2, kept[0] // 2].tolist() == list(RED)


def test_without_pillow_the_error_names_the_install_command(monkeypatch):
    monkeypatch.setattr(image_decoding, "find_spec", lambda name: None)
    with refused(ConfigError, "pillow", fix=["pip install -r requirements-images.txt"]):
        set_up_pillow()


def test_loading_does_not_change_the_pixels():
    data = encoded(picture(3))
    np.testing.assert_array_equal(colours(data), np.asarray(Image.open(io.BytesIO(data))))
