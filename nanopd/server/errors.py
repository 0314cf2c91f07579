"""What goes wrong, as OpenAI's clients expect to hear of it."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        kind: "type" in OpenAI's form.
        param: the field that was wrong.
        code: for programs.
    """

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", *, param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.headers = status, kind, param, code, headers

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(to_json(self.body()), self.status, self.headers, "application/json")


def invalid(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def overloaded(message: str) -> ApiError:
    """The same request may be let in a little later."""
    return ApiError(429, message, "rate_limit_error", code="overloaded", headers={"Retry-After": "1"})


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, "server_error", code="unavailable")


def failed(message: str) -> ApiError:
    return ApiError(500, message, "server_error")


def timed_out(message: str) -> ApiError:
    return ApiError(504, message, "server_error", code="timeout")


def to_json(value: Any) -> bytes:
    """Half a surrogate pair, which clients may send and UTF-8 has no bytes for, becomes the escape it came as."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
