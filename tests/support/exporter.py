"""What a test says the metrics of an installation are: one page a job, for what cannot be broken on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Exporter:
    """``pages``: job → series → value; a job without a page answers 503. ``rates`` are added at each scrape."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.pages: dict[str, dict[str, float] | None] = {}
        self.rates: dict[str, float] = {}

    def page(self, job: str) -> str | None:
        """The page of a job as it is now."""
        known = self.pages.get(job)
        if known is None:
            return None
        for series in known:
            known[series] += self.rates.get(series, 0.0)
        return "".join(f"{series} {value}\n" for series, value in known.items())

    def scrape_configs(self) -> list[dict[str, Any]]:
        """Prometheus's jobs for these pages."""
        return [
            {"job_name": job, "metrics_path": f"/{job}", "static_configs": [{"targets": [self.address]}]}
            for job in self.pages
        ]


@contextmanager
def exporter() -> Iterator[Exporter]:
    """A server on a free port, in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = made.page(self.path.strip("/"))
            self.send_response(200 if page is not None else 503)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write((page or "").encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made = Exporter(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()
