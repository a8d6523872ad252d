"""Drawn images, and a server on loopback that keeps count of those who ask for them."""

import io
import threading
import time

import numpy as np
from PIL import Image

from tests.dataloader.helpers import FaultyServer, Reply

HTML = b"<!DOCTYPE html><html><body>This image has moved</body></html>"


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Smooth colours that no two seeds share."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(seed: int, width: int = 48, height: int = 40) -> bytes:
    return encoded(picture(seed, width, height))


class ImageServer(FaultyServer):
    """Knows when each request came and how many were open at once; every answer takes `seconds`."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.seconds, self.active, self.peak = 0.0, 0, 0
        self.arrivals: list[tuple[float, str]] = []
        self.drip: threading.Event | None = None

    def serve_images(self, count: int) -> list[str]:
        """The addresses of so many images, all different."""
        return [self.serve(f"/{number}.png", Reply(png(number))) for number in range(count)]

    def paths(self) -> list[str]:
        """What was asked for since the last look."""
        arrivals, self.arrivals = self.arrivals, []
        return sorted(path for _, path in arrivals)

    @property
    def moments(self) -> list[float]:
        return [moment for moment, _ in self.arrivals]

    def answer(self, handler) -> None:
        with self.lock:
            self.arrivals.append((time.monotonic(), handler.path))
            self.active += 1
            self.peak = max(self.peak, self.active)
        time.sleep(self.seconds)
        with self.lock:  # before the answer, after which the client may ask again at once
            self.active -= 1
        try:
            if self.drip is not None:
                self._drip(handler)
            else:
                super().answer(handler)
        except ConnectionError:  # the client has had enough
            pass

    def _drip(self, handler) -> None:
        """A byte every few milliseconds until the event is set, or the client has left."""
        handler.send_response(200)
        handler.end_headers()
        while not self.drip.wait(0.01):
            handler.wfile.write(b"x")
            handler.wfile.flush()
