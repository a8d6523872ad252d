"""Decode untrusted image files safely to RGB, as an image viewer shows them."""

import io
import struct
import warnings
import zlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from common.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

# Only the formats that browsers show, because some readers of Pillow for other formats start external programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "MPO", "AVIF")
# Exceptions that these readers raise for damaged files.
DAMAGED = (ArithmeticError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
           struct.error, zlib.error)
READING = 1             # version of the conversion from bytes to RGB; cached vectors of other versions are not reused
MAX_PIXELS = 4_000_000  # larger images are reduced; no image model uses so many pixels
MAX_RATIO = 20          # maximum ratio of the longer to the shorter side; images with a larger ratio are cropped


class BadImage(Exception):
    """The bytes are not a usable image. `status` gives the reason in two or three words."""

    def __init__(self, status: str, detail: str):
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


def set_up_pillow() -> None:
    """Make Pillow reject images that are too large for the memory. Call this function before threads start.

    Raises ConfigError if Pillow is not installed.
    """
    if find_spec("PIL") is None:
        raise ConfigError("pillow", "is not installed", "Images cannot be opened without it",
                          "pip install -r requirements-images.txt")
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")  # Pillow warns about unusual metadata that do not affect pixels
    # Above MAX_IMAGE_PIXELS, Pillow only warns; it raises an error above twice this number. Turn the warning into an
    # error.
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def image_size(data: bytes, check: bool = False) -> tuple[int, int]:
    """Return the width and height of an image in pixels.

    With `check`, the whole image is decoded to find damage. Raises BadImage if the image is not usable.
    """
    return _guarded(_decode if check else _open, data).size


def load_rgb(data: bytes) -> "Image":
    """Decode the first frame of an image as RGB, rotated to the upright position, on a white background.

    An image with more than MAX_PIXELS is reduced by an integer factor. A very long or very wide image is cropped to its
    middle. Raises BadImage if the image is not usable.
    """
    return _guarded(_to_rgb, data)


def _guarded(read, data: bytes):
    from PIL import Image

    try:
        return read(data)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, *DAMAGED) as error:
        status = "too large" if type(error).__name__.startswith("DecompressionBomb") else "not an image"
        raise BadImage(status, " ".join(str(error).split())[:100] or type(error).__name__) from error


def _open(data: bytes) -> "Image":
    from PIL import Image, UnidentifiedImageError

    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(io.BytesIO(data), formats=known)
    except UnidentifiedImageError as error:  # the original message contains only the memory address of a buffer
        raise ValueError(f"begins with {data[:20]!r}") from error


def _decode(data: bytes) -> "Image":
    image = _open(data)
    image.load()
    return image


def _to_rgb(data: bytes) -> "Image":
    from PIL import Image, ImageOps

    image = _decode(data)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per pixel; `convert` would clip the values to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 256).astype(np.uint8))
    image = _bounded(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _bounded(image: "Image") -> "Image":
    width, height = image.size
    # Image models use only the middle square of a long image, but they would enlarge the whole image first.
    length = MAX_RATIO * min(width, height)
    if max(width, height) > length:
        left, top = max(width - length, 0) // 2, max(height - length, 0) // 2
        image = image.crop((left, top, left + min(width, length), top + min(height, length)))
    factor = 1
    while image.width * image.height > MAX_PIXELS * factor * factor:
        factor += 1
    if factor == 1:
        return image
    # `reduce` averages pixels. The indices of a palette cannot be averaged, and the average of colors must take the
    # transparency into account.
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(factor)
