"""A client's connection: aiohttp's, with nothing of a broken request echoed to its sender or traced to the log."""

import logging
from typing import Any

from aiohttp import web

from sage_reconcile.router.answers import Rejected, error_response

log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """aiohttp logs a traceback for every malformed request and answers with the bytes that it did not like."""

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to a request that was not valid HTTP. `message` quotes the client and is left out."""
        if request.writer.output_size:
            raise ConnectionResetError("an answer was begun and cannot be finished")
        if status < 500:
            return error_response(Rejected(status, "bad_request", "the request is not valid HTTP", close=True))
        return error_response(Rejected(status, "internal_error", "the router made a mistake", close=True))

    def close(self) -> None:
        """The router stops. aiohttp's own leaves an idle connection open, and deaf, until the last stream has ended."""
        super().close()
        if self._waiter is not None:
            self.force_close()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        error = kw.get("exc_info")
        log.error("internal error on a connection: %s", type(error).__name__)
