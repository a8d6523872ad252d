"""Pictures from bytes that nobody vouches for: checked to the last pixel, then RGB as a viewer would see it."""

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

# What browsers show, and no more: some of pillow's other readers start outside programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "MPO", "AVIF")
# What these readers raise on damaged files.
DAMAGED = (ArithmeticError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
           struct.error, zlib.error)
READING = 1             # of the way from bytes to RGB; another number where that changes, since vectors are kept by it
MAX_PIXELS = 4_000_000  # of a picture that is kept in memory; more than any image model looks at
MAX_RATIO = 20          # of its sides


class BadImage(Exception):
    """Bytes that are no usable picture; `status` says in two or three words why."""

    def __init__(self, status: str, detail: str):
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


def set_up_pillow() -> None:
    """Require pillow, and refuse images that exceed the memory. Call it before threads start. Raises ConfigError."""
    if find_spec("PIL") is None:
        raise ConfigError("pillow", "is not installed", "images cannot be opened without it",
                          "pip install -r requirements-images.txt")
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, which say nothing of the pixels
    # Above MAX_IMAGE_PIXELS pillow only warns, and above twice as many it raises an error.
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def image_size(data: bytes, check: bool = False) -> tuple[int, int]:
    """Width and height in pixels; with `check` of a picture that decodes to its last pixel. Raises BadImage."""
    return _guarded(_decode if check else _open, data).size


def load_rgb(data: bytes) -> "Image":
    """The first frame, upright, in RGB, transparent parts over white. Raises BadImage.

    One above MAX_PIXELS is made smaller by a whole factor, so that a batch fits into memory; and of a long strip the
    middle is kept, since an image model cuts out the middle square, after it has enlarged the strip as a whole.
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
    except UnidentifiedImageError as error:  # its own message shows the address of a buffer
        raise ValueError(f"begins with {data[:20]!r}") from error


def _decode(data: bytes) -> "Image":
    image = _open(data)
    image.load()
    return image


def _to_rgb(data: bytes) -> "Image":
    from PIL import Image, ImageOps

    image = _decode(data)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 256).astype(np.uint8))
    image = _bounded(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _bounded(image: "Image") -> "Image":
    width, height = image.size
    length = MAX_RATIO * min(width, height)
    if max(width, height) > length:
        left, top = max(width - length, 0) // 2, max(height - length, 0) // 2
        image = image.crop((left, top, left + min(width, length), top + min(height, length)))
    factor = 1
    while image.width * image.height > MAX_PIXELS * factor * factor:
        factor += 1
    if factor == 1:
        return image
    # Palette indices cannot be averaged, and an average of colours has to know their transparency.
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image.reduce(factor)
