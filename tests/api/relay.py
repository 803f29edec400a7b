"""A relay to a server that breaks connections, as networks do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import urlsplit

from tests.aside import PATIENCE


class Relay:
    """Passes connections on to a server. Of the first `breaks` whose request begins with `match`, no more than `most`
    bytes of the answer come through."""

    def __init__(self, url: str, match: bytes, most: int, breaks: int) -> None:
        self._target = (urlsplit(url).hostname, urlsplit(url).port)
        self._match, self._most, self._left = match, most, breaks
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.broken = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        # A thread that waits in accept is not woken by a close.
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                ours, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(ours,), daemon=True).start()

    def _serve(self, ours: socket.socket) -> None:
        with suppress(OSError), ours, socket.create_connection(self._target) as theirs:
            ours.settimeout(PATIENCE)
            theirs.settimeout(PATIENCE)
            limit: int | None = None
            request = ours.recv(65536)
            if request.startswith(self._match) and self._left:
                self._left -= 1
                limit = self._most
            theirs.sendall(request)
            threading.Thread(target=_copy, args=(ours, theirs), daemon=True).start()
            passed = 0
            while data := theirs.recv(65536):
                if limit is not None and passed + len(data) > limit:
                    ours.sendall(data[: limit - passed])
                    self.broken += 1
                    # Closing is not enough while the other thread reads.
                    ours.shutdown(socket.SHUT_RDWR)
                    return
                passed += len(data)
                ours.sendall(data)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)


@contextmanager
def relay(url: str, match: bytes, *, most: int, breaks: int = 1) -> Iterator[Relay]:
    """A relay to the server at `url`."""
    with closing(Relay(url, match, most, breaks)) as relay:
        yield relay
