"""Every refusal in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, whatever the status."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from peqa_runtime import errors as runtime

log = logging.getLogger("peqa.server")

MAX_MESSAGE = 1000  # characters; a client's number of 4000 digits is not sent back whole

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    412: "conflict_error",
    429: "rate_limit_error",
}

# Most special first: the first class that matches decides.
_STATUS: tuple[tuple[type[runtime.PeqaError], int, str], ...] = (
    (runtime.PromptTooLong, 400, "context_length_exceeded"),
    (runtime.InvalidRequest, 400, "invalid_value"),
    (runtime.TaskUnusable, 409, "task_unusable"),
    (runtime.TaskQuarantined, 409, "task_quarantined"),
    (runtime.UnknownTask, 404, "task_not_found"),
    (runtime.InvalidTaskName, 422, "invalid_task_name"),
    (runtime.WrongBase, 409, "wrong_base"),
    (runtime.InvalidScaleSet, 422, "invalid_scale_set"),
    (runtime.RevisionConflict, 412, "revision_conflict"),
    (runtime.NoSuchRevision, 409, "no_such_revision"),
    (runtime.Overloaded, 429, "overloaded"),
    (runtime.EngineDead, 503, "engine_dead"),
    (runtime.StoreError, 507, "store_error"),
)


class ApiError(Exception):
    """A refusal with its HTTP status. `param` names the field that is wrong; `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """The JSON body of this refusal."""
        return {
            "error": {
                "message": self.message,
                "type": _error_type(self.status),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """The HTTP response of this refusal."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def _error_type(status: int) -> str:
    default = "server_error" if status >= 500 else "invalid_request_error"
    return _TYPES.get(status, default)


def to_api_error(error: Exception) -> ApiError:
    """Translate any exception into a refusal; what nobody named becomes a 500 that shows no inner text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return describe_validation(error)
    if isinstance(error, runtime.PeqaError):
        for kind, status, code in _STATUS:
            if isinstance(error, kind):
                headers = {}
                if isinstance(error, runtime.Overloaded):
                    headers["Retry-After"] = str(max(1, round(error.retry_after)))
                elif status == 503:
                    headers["Retry-After"] = "5"
                return ApiError(
                    status, str(error), code=code, param=getattr(error, "param", None), headers=headers
                )
    if isinstance(error, HTTPException):
        return _from_http(error)
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def _from_http(error: HTTPException) -> ApiError:
    known = {
        404: ("no such route; /openapi.json lists them", "route_not_found"),
        405: ("this route does not take that method", "method_not_allowed"),
    }
    message, code = known.get(error.status_code, (str(error.detail), "http_error"))
    headers = dict(error.headers or {})
    if error.status_code == 405 and "Allow" in headers:
        message += f"; allowed: {headers['Allow']}"
    return ApiError(error.status_code, message, code=code, headers=headers)


_WANTED: Mapping[str, str] = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 64 bits",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "string_unicode": "must be a string of valid Unicode",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must match {pattern}",
    "list_type": "must be a list",
    "too_short": "must not be an empty list",
    "none_required": "must be null",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}


def describe_validation(error: ValidationError) -> ApiError:
    """One sentence about the first field that is wrong: its name, what it must be, what it was."""
    first = error.errors(include_url=False, include_context=True)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else str(part))
    kind = first["type"]
    if kind == "missing":
        return ApiError(400, f"{path} is missing", code="missing_field", param=path)
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown field {path[:80]!r}", code="unknown_field", param=path[:80])
    wanted = _WANTED.get(kind, first["msg"]).replace("{pattern}", first.get("ctx", {}).get("pattern", ""))
    if not path:
        return ApiError(400, f"the body {wanted}, got {show(first['input'])}", code="invalid_type")
    return ApiError(400, f"{path} {wanted}, got {show(first['input'])}", code="invalid_type", param=path)


def show(value: object) -> str:
    """A short picture of a JSON value for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode("utf-8")
        return f"the string {text!r}" if len(text) <= 40 else f"a string of {len(text)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
