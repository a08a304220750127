"""What the router itself says: errors in the shape of OpenAI's, the list of models, its health."""

import json
from typing import Any

from aiohttp import web

from sage_reconcile.core.routes import NoBackend, RouteTable, models

# Instead of aiohttp's own, which tells versions.
SERVER = "sage"


class Rejected(Exception):
    """A request that ends here: raised where it is found out, answered at the edge."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers
        # Whether the connection ends too, because the rest of the request is not worth reading.
        self.close = close


def rejected(why: NoBackend) -> Rejected:
    """The answer to a request that no backend takes."""
    headers = () if why.retry_after_seconds is None else (("Retry-After", str(why.retry_after_seconds)),)
    param = "model" if why.code in ("model_not_found", "wrong_kind", "model_required") else None
    return Rejected(why.status, why.code, why.message, param=param, headers=headers)


def error_response(trouble: Rejected) -> web.Response:
    error_type = "invalid_request_error" if trouble.status < 500 else "server_error"
    response = json_response(
        {"error": error_body(trouble.message, error_type, trouble.code, trouble.param)}, status=trouble.status
    )
    response.headers.extend(trouble.headers)
    if trouble.close:
        response.force_close()
    return response


def error_body(message: str, error_type: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An error as platform.openai.com/docs/guides/error-codes has it."""
    return {"message": message, "type": error_type, "param": param, "code": code}


def json_response(content: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=json.dumps(content).encode(), content_type="application/json", headers={"Server": SERVER}
    )


def model_list(table: RouteTable) -> dict[str, Any]:
    """The models that a request can name now, as GET /v1/models lists them."""
    return {
        "object": "list",
        "data": [
            {
                "id": backend.model,
                "object": "model",
                "created": int(table.taken_at),
                "owned_by": "sage",
                "kind": backend.kind,
                "aliases": [name for name in backend.names if name != backend.model],
                "engine": str(backend.engine),
            }
            for backend in models(table)
        ],
    }


def health(table: RouteTable, now: float) -> dict[str, Any]:
    """That the router works, whatever runs behind it. `now` is in epoch seconds."""
    return {
        "status": "ok",
        "engines": {"ready": ready_count(table), "total": len(table.backends) + len(table.absent)},
        # None as long as nothing was ever observed.
        "table_age_seconds": round(max(0.0, now - table.taken_at), 3) if table.taken_at else None,
    }


def readiness(table: RouteTable) -> web.Response:
    """200 when at least one backend would take a request, else 503."""
    count = ready_count(table)
    return json_response({"status": "ready" if count else "not ready", "ready": count}, status=200 if count else 503)


def ready_count(table: RouteTable) -> int:
    return sum(backend.state == "ready" for backend in table.backends)
