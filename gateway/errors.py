"""Errors that an HTTP client sees, in OpenAI's shape."""

from __future__ import annotations

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """What goes wrong with one HTTP request: status, code for programs, one line for people.

    `param` names the field that is at fault; `retry_after_s` > 0 becomes a `Retry-After` header.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that go with the error."""
        return {"retry-after": str(self.retry_after_s)} if self.retry_after_s else {}

    def body(self) -> dict[str, object]:
        """Return the JSON body."""
        kind = _TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def invalid(param: str, value: object, rule: str, *, code: str = "invalid_value") -> ApiError:
    """Return the 400 for a field whose value breaks a rule."""
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return ApiError(400, code, f"{param} = {shown}: {rule}", param=param)
