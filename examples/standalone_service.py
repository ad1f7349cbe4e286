"""A reward service without this project's package: the standard library, numpy and Pillow; JSON bodies only.

Its score is the warmth of a picture, the mean of (R - B) / 255. To serve it: python examples/standalone_service.py 8001
"""

import base64
import io
import json
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

NAME, VERSION = "warmth", "1"
LIMITS = {"max_images": 64, "max_body_bytes": 16 * 2**20, "max_pixels": 2**20, "max_prompt_chars": 1000}
INFO = {"name": NAME, "version": VERSION, "low": -1.0, "high": 1.0, "bodies": ["application/json"], "limits": LIMITS}
PAGES: dict[str, dict[str, Any]] = {"/info": INFO, "/healthz": {"status": "ok"}, "/readyz": {"status": "ok"}}
BODIES = threading.BoundedSemaphore(16)  # in memory at once


class Problem(Exception):
    """An error as RFC 9457 has it; `index` is the position of the image or prompt at fault."""

    def __init__(self, status: int, detail: str, index: int | None = None) -> None:
        self.status = status
        self.content = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
        if index is not None:
            self.content["index"] = index


def warmth(text: str, index: int) -> float:
    """Score one picture, a file in base64."""
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG", "JPEG", "WEBP"))
        if picture.width * picture.height > LIMITS["max_pixels"]:
            raise ValueError("too large")  # only the header was read so far
        colours = picture.convert("RGBA")
    except Exception as error:
        most = f"at most {LIMITS['max_pixels']} pixels"
        raise Problem(422, f"image {index} is no PNG, JPEG or WebP of {most} in base64: send one", index) from error
    pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours), dtype=np.int64)
    return float((pixels[..., 0] - pixels[..., 2]).mean() / 255)


def answer(body: bytes) -> dict[str, Any]:
    """Answer the body of POST /score."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "the body is not JSON: send an object") from error
    if not isinstance(request, dict) or not request.keys() <= {"images", "prompts"}:
        raise Problem(400, "the body must be an object of 'images', perhaps 'prompts', and nothing else")
    images = request.get("images")
    if not is_texts(images) or not images:
        raise Problem(400, "'images' must be a list of at least one base64 text")
    if len(images) > LIMITS["max_images"]:
        raise Problem(413, f"{len(images)} images, limit {LIMITS['max_images']}: split the batch")
    prompts = request.get("prompts")
    if prompts is not None and (not is_texts(prompts) or len(prompts) != len(images)):
        raise Problem(400, f"'prompts' must be {len(images)} texts, one for each image, or be left out")
    for index, prompt in enumerate(prompts or ()):  # warmth reads none, but the limit is promised
        if len(prompt) > LIMITS["max_prompt_chars"]:
            raise Problem(422, f"prompt {index} has over {LIMITS['max_prompt_chars']} characters: shorten it", index)
    started_s = time.monotonic()
    scores = [warmth(text, index) for index, text in enumerate(images)]
    timing_ms = {"queue": 0.0, "score": 1000 * (time.monotonic() - started_s)}
    return {"scores": scores, "reward": NAME, "version": VERSION, "timing_ms": timing_ms}


def is_texts(value: object) -> bool:
    """Whether it is a list of nothing but strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


class Handler(BaseHTTPRequestHandler):
    """One connection, on a thread of its own."""

    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds of silence, also in the middle of a body
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path in PAGES:
            self.send(200, PAGES[self.path])
        else:
            self.send_error(405 if self.path == "/score" else 404, f"GET {self.path[:80]}: see /info")

    def do_POST(self) -> None:
        if not BODIES.acquire(blocking=False):
            return self.send_error(429, "too many requests are in work: come back in a second")
        try:
            body = self.read_body()
            if self.path != "/score":
                raise Problem(405 if self.path in PAGES else 404, f"POST {self.path[:80]}: send it to /score")
            media = self.headers.get_content_type()
            if media != "application/json":
                raise Problem(415, f"the body is {media[:80]!r}: send application/json")
            self.send(200, answer(body))
        except Problem as problem:
            self.send(problem.status, problem.content)
        finally:
            BODIES.release()

    def read_body(self) -> bytes:
        length, limit = self.headers.get("Content-Length", ""), LIMITS["max_body_bytes"]
        if not (length.isascii() and length.isdigit()) or len(length) > 20:
            raise Problem(411, "the request needs a Content-Length: send one")
        if int(length) <= limit:
            return self.rfile.read(int(length))
        left = min(int(length), 8 * limit)  # read past it: who is cut off while sending may never see the answer
        while left > 0 and (piece := self.rfile.read1(min(left, 2**16))):
            left -= len(piece)
        raise Problem(413, f"the body has {length} bytes, limit {limit}: split the batch")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Give the library's own errors the same form."""
        self.send(code, Problem(code, message or HTTPStatus(code).description).content)

    def send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if status == 200 else "application/problem+json")
        self.send_header("Content-Length", str(len(body)))
        if status != 200:
            self.send_header("Connection", "close")  # with whatever of the request was not read
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


if __name__ == "__main__":
    try:
        listening = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    except (IndexError, ValueError, OverflowError, OSError) as error:
        sys.exit(f"error: {error}: give a free PORT, or 0 for any")
    with listening as server:
        print(f"{NAME} at http://127.0.0.1:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            sys.exit(130)
