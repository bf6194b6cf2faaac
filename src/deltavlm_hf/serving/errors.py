"""What a client is told when there is no answer: OpenAI's form, plain words, nothing of this machine."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..inference.remote import UnreachableError

logger = logging.getLogger(__name__)

# What can be told, for the API's description. No error has status 422, which FastAPI would describe by itself.
_REASONS = {
    400: "The request is not of this form; `param` says where.",
    401: "The key is missing or wrong.",
    404: "There is no such model, or no such pair, or no longer.",
    408: "The request did not come in time.",
    411: "The request does not say how long it is.",
    413: "The request or one of its images is too large.",
    429: "Much is waiting already; try again after the seconds in `Retry-After`.",
    500: "A fault of the server, which its log has.",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_WORDS = {
    404: "There is nothing here; see /docs for what there is.",
    405: "This address does not take this method; see /docs.",
}


class _Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What is said where there is no answer."""

    error: _Error


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors of an address, as FastAPI takes them for its description."""
    reasons = {"default": "Any other error."} | {status: _REASONS[status] for status in statuses}
    return {status: {"model": ErrorBody, "description": reason} for status, reason in reasons.items()}


class ApiError(Exception):
    """
    A request that gets no answer.

    Args:
        message (`str`): for the client: what was given, what was expected, what to do.
        status (`int`, *optional*, defaults to 400): of HTTP.
        param (`str`, *optional*): the part of the request that is at fault.
        code (`str`, *optional*): a word for programs.
        retry_after (`int`, *optional*): seconds after which to try again.
        challenge (`str`, *optional*, defaults to `"Bearer"`): with status 401, how a key is asked for.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        challenge: str = "Bearer",
    ):
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.challenge = challenge

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = self.challenge
        return JSONResponse(self.body(), self.status, headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error: ours are said, all others are for the log."""
    if isinstance(error, ApiError):
        return error
    logger.error("A request failed", exc_info=error)
    if isinstance(error, UnreachableError):
        return ApiError(
            "The language model does not answer. Ask again in a moment.",
            503,
            code="language_model_unavailable",
            retry_after=5,
        )
    return ApiError("Something went wrong here, and has been noted. Try again, or other images.", 500)


def add_handlers(app: FastAPI) -> None:
    """Has all errors of an app told in this form."""

    @app.exception_handler(ApiError)
    def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])[:100].encode("ascii", "backslashreplace").decode()
        if first["type"] == "json_invalid":
            return ApiError("The body is no JSON.").response()
        if not place:
            return ApiError("Send a JSON object, with the header `Content-Type: application/json`.").response()
        if first["type"] == "extra_forbidden":
            return ApiError(f"`{place}` is not supported: leave it out.", param=place).response()
        return ApiError(f"`{place}`: {first['msg']}.".replace("Value error, ", ""), param=place).response()

    @app.exception_handler(HTTPException)
    def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(_WORDS.get(error.status_code, str(error.detail)), error.status_code).response()

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:  # the server logs it
        return ApiError("Something went wrong here, and has been noted.", 500).response()
