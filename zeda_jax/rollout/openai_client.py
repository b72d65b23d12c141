"""HTTP to an OpenAI-compatible server: JSON in and out, with retries of what may be retried and errors as sentences."""

import asyncio
import dataclasses
import datetime
import email.utils
import ipaddress
import os
import random
import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from zeda_jax.errors import ZedaError

T = TypeVar("T")

# Statuses that say "not now": too many requests, overload, restarts, proxies without a server behind them.
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0  # seconds between attempts: doubled each time, up to the longest
_CONNECT_SECONDS = 30.0
_ERROR_CHARACTERS = 300
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class Garbled(Exception):
  """An answer that is no answer: the request may be sent again."""


class Refused(ZedaError):
  """The server understood the request and will not do it; `status` is HTTP's."""

  def __init__(self, message: str, status: int):
    super().__init__(message)
    self.status = status


def base_url(url: str) -> str:
  """The address below which /completions lies; one without a path gets OpenAI's /v1.

  Raises:
    ZedaError: it is no http(s) address, or holds a password or a query, which would be written down with the settings.
  """
  advice = "expected one such as http://localhost:8000/v1."
  try:
    parts = urllib.parse.urlsplit(url)
    parts.port  # noqa: B018 (raises ValueError where it is no number)
  except ValueError as error:
    raise ZedaError(f"config.rollout.url is no address ({error}); {advice}") from None
  if "@" in parts.netloc or parts.query or parts.fragment:
    raise ZedaError(
      "config.rollout.url holds a user name, a query or a fragment; expected none: give a key by the name of an "
      "environment variable, as config.rollout.key_variable."
    )
  if parts.scheme not in ("http", "https") or not parts.hostname:
    raise ZedaError(f"config.rollout.url is {url!r}; {advice}")
  return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def read_key(variable: str) -> str:
  """The key that an environment variable holds; "" where no variable is named.

  Raises:
    ZedaError: it is no name of a variable (it may be the key itself, which is not repeated), or not set.
  """
  if not variable:
    return ""
  check_variable(variable)
  key = os.environ.get(variable, "").strip()
  if not key:
    raise ZedaError(f"config.rollout.key_variable: the environment variable {variable} is not set or empty: export it.")
  if not key.isascii() or not key.isprintable():
    raise ZedaError(f"config.rollout.key_variable: the key in {variable} has characters that no HTTP header may hold.")
  return key


def check_variable(variable: str) -> None:
  """Raises ZedaError, without repeating it, for what cannot be the name of an environment variable."""
  if variable and not _VARIABLE.fullmatch(variable):
    raise ZedaError(
      "config.rollout.key_variable is no name of an environment variable in capitals; expected one such as "
      "VLLM_API_KEY, which holds the key. The key itself belongs into no setting."
    )


@dataclasses.dataclass
class Client:
  """Requests to one server, from one event loop, which also calls `close`.

  Attributes:
    url: see `base_url`.
    key: sent as a bearer token; never part of an error.
    timeout: seconds of one attempt, from connecting to the last byte.
    retries: further attempts of a request that failed in a way that may pass.
  """

  url: str
  key: str = ""
  timeout: float = 3600.0
  retries: int = 12
  first_pause: float = _FIRST_PAUSE

  def __post_init__(self) -> None:
    try:
      import httpx
    except ImportError:
      raise ZedaError(
        "config.rollout.engine=openai needs the package httpx: pip install 'zeda-jax[openai]' (or httpx)."
      ) from None
    self._httpx = httpx
    self._jitter = random.Random()
    self._http: Any = None

  def _open(self) -> Any:
    httpx = self._httpx
    headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
    direct = _is_this_machine(self.url)  # a proxy of the environment cannot reach this machine's own ports
    # A request may wait for hours without a byte: keep-alive probes tell a slow server from a lost one.
    transport = None if not direct and urllib.request.getproxies() else _kept_alive(httpx)
    return httpx.AsyncClient(
      headers=headers,
      timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
      limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
      transport=transport,
      trust_env=not direct,
    )

  async def close(self) -> None:
    if self._http is not None:
      await self._http.aclose()

  async def get(self, path: str, retries: int | None = None) -> Any:
    return await self.request("GET", path, None, lambda value: value, retries)

  async def post(self, path: str, body: Mapping[str, Any], parse: Callable[[Any], T], retries: int | None = None) -> T:
    """What `parse` makes of the answer; where it raises Garbled, the request is sent again."""
    return await self.request("POST", path, body, parse, retries)

  async def request(
    self, method: str, path: str, body: Mapping[str, Any] | None, parse: Callable[[Any], T], retries: int | None = None
  ) -> T:
    """One request, until it is answered; `path` is below the server's address, or an address of its own.

    Raises:
      Refused: the server refuses it with a status that another attempt will not change.
      ZedaError: all attempts failed.
    """
    retries = self.retries if retries is None else retries
    address = path if path.startswith("http") else self.url + path
    self._http = self._http or self._open()
    for attempt in range(retries + 1):
      pause: float | None = None
      try:
        async with asyncio.timeout(self.timeout):
          response = await self._http.request(method, address, json=body)
        if response.status_code in RETRIED:
          failure, pause = self._describe(response), retry_after(response.headers.get("retry-after"))
        elif response.status_code != 200:
          raise Refused(f"{address} refuses the request: {self._describe(response)}", response.status_code)
        else:
          return parse(_json(response))
      except TimeoutError:
        failure = f"no answer within {self.timeout:g} s (config.rollout.timeout)"
      except self._httpx.UnsupportedProtocol:
        raise
      except (self._httpx.TransportError, self._httpx.DecodingError) as error:
        failure = f"{type(error).__name__} {error}".strip()
      except Garbled as error:
        failure = str(error)
      if attempt < retries:
        await asyncio.sleep(self._pause(attempt, pause, address))
    times = "once" if retries == 0 else f"{retries + 1} times"
    raise ZedaError(
      f"{address} was asked {times} without success; the last time: {self._redacted(failure).rstrip('.')}."
    )

  def _pause(self, attempt: int, asked: float | None, address: str) -> float:
    """Seconds to the next attempt: exponential with jitter, and never before the server wants it."""
    if asked is not None and asked > self.timeout:
      raise ZedaError(
        f"{address} asks to come back in {asked:.0f} s, later than config.rollout.timeout={self.timeout:g} "
        "allows: run the command again then."
      )
    longest = min(_LONGEST_PAUSE, self.first_pause * 2**attempt)
    return (asked or 0.0) + longest * self._jitter.uniform(0.5, 1.0)

  def _describe(self, response: Any) -> str:
    """Status and what the server says about it."""
    try:
      text = _message(response.json()) or response.text
    except ValueError:
      text = response.text
    text = " ".join(text.split())
    text = text if len(text) <= _ERROR_CHARACTERS else text[:_ERROR_CHARACTERS] + " ..."
    return self._redacted(f"status {response.status_code} {response.reason_phrase}" + (f": {text}" if text else ""))

  def _redacted(self, text: str) -> str:
    return text.replace(self.key, "(key)") if self.key else text


def retry_after(value: str | None) -> float | None:
  """Seconds that a Retry-After header asks for, given as a number or as a date; None where it says nothing."""
  if value is None:
    return None
  try:
    return max(0.0, float(value))
  except ValueError:
    pass
  try:
    date = email.utils.parsedate_to_datetime(value)
  except ValueError:
    return None
  if date.tzinfo is None:
    date = date.replace(tzinfo=datetime.UTC)
  return max(0.0, date.timestamp() - time.time())


def _json(response: Any) -> Any:
  try:
    return response.json()
  except ValueError as error:
    raise Garbled(f"status 200 with an answer that is not JSON ({error})") from None


def _message(value: Any) -> str:
  """The text of an error as OpenAI, vLLM, SGLang and FastAPI write it."""
  if isinstance(value, Mapping):
    for name in ("error", "message", "detail"):
      if value.get(name):
        return _message(value[name])
    return ""
  return value if isinstance(value, str) else str(value)


def _is_this_machine(url: str) -> bool:
  host = urllib.parse.urlsplit(url).hostname or ""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def _kept_alive(httpx: Any) -> Any:
  options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
  for name, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
    if hasattr(socket, name):  # not on every system
      options.append((socket.IPPROTO_TCP, getattr(socket, name), seconds))
  limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
  return httpx.AsyncHTTPTransport(socket_options=options, limits=limits)
