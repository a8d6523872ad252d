"""An OpenAI-compatible endpoint on loopback with scripted answers."""

import http.server
import json
import threading
import time
from collections.abc import Callable

KEY = "sk-test-0123456789"


class Endpoint:
    """Returns (length, number of a's, 1) for each text; `script` may replace the answer to request n."""

    def __init__(self, script: Callable[[int], tuple[int, dict, str] | None] = lambda number: None):
        self.script, self.asked, self.times, self.headers, self.paths = script, [], [], [], []
        self.busy, self.most_busy, self.slow, self.lock = 0, 0, 0.0, threading.Lock()
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):  # noqa: N802 (the name that http.server calls)
                endpoint.answer(self)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.asked)
            self.asked.append(body)
            self.times.append(time.monotonic())
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        time.sleep(self.slow)
        status, headers, text = self.script(number) or (200, {}, self.good(body["input"]))
        with self.lock:
            self.busy -= 1
        if status == 0:  # cut off
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(text.encode())
            return
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())

    @staticmethod
    def good(texts: list[str]) -> str:
        rows = [{"object": "embedding", "index": i, "embedding": vector(text)} for i, text in enumerate(texts)]
        return json.dumps({"object": "list", "data": rows[::-1], "model": "m"})  # `index` tells the order


def vector(text: str) -> list[float]:
    return [float(len(text)), float(text.count("a")), 1.0]
