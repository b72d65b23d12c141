"""Errors in the shape of OpenAI's API."""

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
  """What a client is told: an HTTP status and a sentence.

  Attributes:
    status: HTTP status.
    param: the field of the request that is wrong, if it is one.
    code: a name that programs can compare with.
  """

  def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code

  @property
  def headers(self) -> dict[str, str]:
    if self.status == 401:
      return {"WWW-Authenticate": "Bearer"}
    return {"Retry-After": "1"} if self.status in (429, 503) else {}

  def body(self) -> dict[str, Any]:
    kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
