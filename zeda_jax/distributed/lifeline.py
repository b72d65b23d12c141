"""Connections between process 0 and all others, by which each learns at once that another one has ended.

They are made where JAX's coordination service will listen, before it does: so a process that is missing is a sentence.
A connection closes with its process, however that ends; the kernel's keepalive finds a host that is gone. No process
has to send anything meanwhile, so one that is busy is never taken for dead.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from typing import Any

from zeda_jax.distributed.cluster import Place
from zeda_jax.errors import ZedaError

DIED = 75  # EX_TEMPFAIL: nothing is wrong with what was asked for, try again
_HELLO_SECONDS = 5.0  # for a connected process to say who it is
_PORT_SECONDS = 30.0  # for the port to be free: processes of a run before this one may still be ending
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 11_000}  # 11 s in all


@dataclasses.dataclass
class _Peer:
  connection: socket.socket
  host: str
  unread: bytes = b""
  finished: bool = False


def meet(place: Place, timeout: float) -> "Lifeline":
  """Waits until all processes of the run are there.

  Raises:
    ZedaError: not all of them came in time, or they disagree about their number or their ids.
  """
  deadline = time.monotonic() + timeout
  peers = _gather(place, timeout, deadline) if place.process_id == 0 else _join(place, timeout, deadline)
  _delay_abort()
  return Lifeline(place, peers)


class Lifeline:
  """Watches the other processes from a thread; ends this one if one of them ends before `finish`."""

  def __init__(self, place: Place, peers: dict[int, _Peer]):
    self._place, self._peers = place, peers
    self._all_finished = threading.Event()
    threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

  def finish(self) -> None:
    """Says that this process is done, and waits until all are."""
    if self._place.process_id != 0:
      self._tell({"finished": True})
    self._all_finished.wait()
    if self._place.process_id == 0:
      self._tell({"finished": True})

  def fail(self, status: int, text: str) -> None:
    """Tells the others that this process ends with an error."""
    host = socket.gethostname()
    self._tell({"stopped": self._place.process_id, "host": host, "status": status or 1, "text": text})

  def _tell(self, message: dict[str, Any]) -> None:
    for peer in list(self._peers.values()):
      with contextlib.suppress(OSError):
        peer.connection.sendall(_line(message))

  def _watch(self) -> None:
    with selectors.DefaultSelector() as selector:
      for process, peer in self._peers.items():
        selector.register(peer.connection, selectors.EVENT_READ, process)
      while selector.get_map():
        for key, _ in selector.select():
          if not self._read(key.data):
            selector.unregister(key.fileobj)

  def _read(self, process: int) -> bool:
    """Takes in what a process said; False if it will say no more."""
    peer = self._peers[process]
    try:
      data = peer.connection.recv(2**16)
    except OSError:
      data = b""
    if not data:
      if not peer.finished:
        self._stop({"stopped": process, "host": peer.host, "status": DIED})
      return False
    *lines, peer.unread = (peer.unread + data).split(b"\n")
    for line in lines:
      message = json.loads(line)
      if "stopped" in message:
        self._stop(message)
      peer.finished = True
      if all(other.finished for other in self._peers.values()):
        self._all_finished.set()
    return True

  def _stop(self, news: dict[str, Any]) -> None:
    """Passes the news on and ends this process; one that failed itself hears so, too, and needs no second sentence."""
    if news["stopped"] == self._place.process_id:
      return
    if self._place.process_id == 0:
      self._tell(news)
    _print_and_exit(self._place, news)


def _print_and_exit(place: Place, news: dict[str, Any]) -> None:
  who = f"process {news['stopped']} ({news['host']})"
  if news["status"] == DIED and not news.get("text"):
    what = (
      f"{who} has died or cannot be reached any more, so this one stops; run the same command again on all processes "
      "to go on from what is saved."
    )
  else:
    text = f": {news['text']}" if news.get("text") else "."
    what = f"stopped, because {who} stopped with an error{text}"
  cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # which a progress bar hides
  # The main thread may hold any lock of Python's streams.
  os.write(2, f"{cursor}zeda: process {place.process_id} of {place.num_processes}: {what}\n".encode())
  os._exit(news["status"])


def _delay_abort() -> None:
  """Lets SIGABRT take effect only after 6 seconds, by making sleep(SIGABRT = 6) its handler.

  JAX aborts a process at once when process 0, which hosts its coordination service, has died. In these seconds the
  thread of the Lifeline sees the same, and ends the process with a sentence and its own status.
  """
  with contextlib.suppress(OSError, AttributeError, TypeError):  # no libc
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def _gather(place: Place, timeout: float, deadline: float) -> dict[int, _Peer]:
  """Process 0: takes in all others."""
  peers: dict[int, _Peer] = {}
  reminder = time.monotonic() + 15
  with _listen(place, deadline) as listener:
    while len(peers) < place.num_processes - 1:
      now = time.monotonic()
      missing = ", ".join(str(i) for i in range(1, place.num_processes) if i not in peers)
      if now > deadline:
        raise _refuse(
          peers,
          f"process {missing} of {place.num_processes} did not come to process 0 at {place.coordinator} within "
          f"{timeout:g} s: start all processes with the same --coordinator and --num-processes.",
        )
      if now > reminder:
        reminder = deadline
        print(f"zeda: waiting at {place.coordinator} for process {missing} of {place.num_processes}", file=sys.stderr)
      listener.settimeout(max(0.01, min(deadline, reminder) - now))
      with contextlib.suppress(TimeoutError):
        _take_in(place, listener.accept()[0], peers)
  for peer in peers.values():
    with contextlib.suppress(OSError):  # the Lifeline will see it
      peer.connection.sendall(_line({"welcome": True}))
  return peers


def _listen(place: Place, deadline: float) -> socket.socket:
  port = int(place.coordinator.rpartition(":")[2])
  deadline = min(deadline, time.monotonic() + _PORT_SECONDS)
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  while True:
    try:
      return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
      if time.monotonic() > deadline:
        reason = os.strerror(error.errno or 0)
        raise ZedaError(
          f"process 0 cannot listen on port {port} of this host ({reason}): choose another port for --coordinator, or "
          "end what uses it."
        ) from None
      time.sleep(0.2)


def _take_in(place: Place, connection: socket.socket, peers: dict[int, _Peer]) -> None:
  hello = _hear(connection, _HELLO_SECONDS)
  if hello is None or "process" not in hello:
    connection.close()  # not one of ours
    return
  process, count, host = hello["process"], hello["of"], hello["host"]
  twin = peers.get(process)
  if twin is not None and _is_closed(twin.connection):
    twin = None  # it was started again meanwhile
  problem = ""
  if count != place.num_processes:
    problem = f"process {process} ({host}) has --num-processes={count}, process 0 has {place.num_processes}"
  elif twin is not None or process == 0:
    other = twin.host if twin is not None else socket.gethostname()
    problem = f"two processes, on {other} and {host}, have --process-id={process}"
  if problem:
    raise _refuse(
      peers | {-1: _Peer(connection, host)},
      f"{problem}: give every process the same --num-processes and a --process-id of its own.",
    )
  _keep_alive(connection)
  peers[process] = _Peer(connection, host)


def _refuse(peers: dict[int, _Peer], reason: str) -> ZedaError:
  for peer in peers.values():
    with contextlib.suppress(OSError):
      peer.connection.sendall(_line({"refused": reason}))
      peer.connection.close()
  return ZedaError(reason)


def _is_closed(connection: socket.socket) -> bool:
  connection.setblocking(False)
  try:
    return not connection.recv(1, socket.MSG_PEEK)
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    connection.setblocking(True)


def _join(place: Place, timeout: float, deadline: float) -> dict[int, _Peer]:
  """Any other process: goes to process 0 and waits until it has found all."""
  host, _, port = place.coordinator.rpartition(":")
  hello = {"process": place.process_id, "of": place.num_processes, "host": socket.gethostname()}
  reason = "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      connection = socket.create_connection((host.strip("[]"), int(port)), min(left, _HELLO_SECONDS))
    except OSError as error:  # not yet there, or its name is not yet known
      reason = error.strerror or str(error)
      time.sleep(min(0.2, left))
      continue
    with contextlib.suppress(OSError):
      connection.sendall(_line(hello))
    _keep_alive(connection)
    answer = _hear(connection, max(0.01, deadline + 1 - time.monotonic()))
    if answer and "welcome" in answer:
      return {0: _Peer(connection, host)}
    connection.close()
    if answer and "refused" in answer:
      raise ZedaError(answer["refused"])
    reason = "it accepts no process of this run"  # perhaps still the run before
    time.sleep(0.2)
  raise ZedaError(
    f"process {place.process_id} of {place.num_processes} cannot reach process 0 at {place.coordinator} within "
    f"{timeout:g} s ({reason}): check that it runs, and that this host ({socket.gethostname()}) can reach that port."
  )


def _line(message: dict[str, Any]) -> bytes:
  return json.dumps(message).encode() + b"\n"


def _hear(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
  """One line of the other side, None if it says nothing sensible."""
  deadline, line = time.monotonic() + seconds, b""
  try:
    while not line.endswith(b"\n") and len(line) < 2**12:
      connection.settimeout(max(0.01, deadline - time.monotonic()))
      byte = connection.recv(1)
      if not byte:
        return None
      line += byte
    message = json.loads(line)
  except (OSError, ValueError):
    return None
  finally:
    connection.settimeout(None)
  return message if isinstance(message, dict) else None


def _keep_alive(connection: socket.socket) -> None:
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in _KEEPALIVE.items():
    if hasattr(socket, name):  # not all systems have all
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
