"""Generated images, and a server on loopback that counts the requests for them."""

import io
import threading
import time

import numpy as np
from PIL import Image

from tests.dataloader.helpers import FaultyServer, Reply

HTML = b"<!DOCTYPE html><html><body>This image has moved</body></html>"


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """An image of smooth colours, another one for each seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(seed: int, width: int = 48, height: int = 40) -> bytes:
    return encoded(picture(seed, width, height))


class ImageServer(FaultyServer):
    """Records the time of each request and the peak number of open ones; every answer takes `seconds`."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()
        self.seconds, self.active, self.peak = 0.0, 0, 0
        self.arrivals: list[tuple[float, str]] = []
        self.drip: threading.Event | None = None

    def serve_images(self, count: int) -> list[str]:
        """Serve `count` different images and return their addresses."""
        return [self.serve(f"/{number}.png", Reply(png(number))) for number in range(count)]

    def paths(self) -> list[str]:
        """The requested paths since the last call, sorted."""
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
        with self.lock:  # before the answer: the client may send the next request right after it
            self.active -= 1
        try:
            if self.drip is not None:
                self._drip(handler)
            else:
                super().answer(handler)
        except ConnectionError:  # the client closed the connection
            pass

    def _drip(self, handler) -> None:
        """Send one byte every few milliseconds until the event is set or the client disconnects."""
        handler.send_response(200)
        handler.end_headers()
        while not self.drip.wait(0.01):
            handler.wfile.write(b"x")
            handler.wfile.flush()
