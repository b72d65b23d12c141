"""From a directory to a running server, and its orderly end."""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
from collections.abc import Callable, Iterator

import jax
import uvicorn

from zeda_jax.checkpoint.huggingface import load_hf
from zeda_jax.config import read_config
from zeda_jax.data.chat import Tokenizer, check_vocabulary, eos_ids, load_tokenizer
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.models.params import reconfigured
from zeda_jax.rollout.requests import Request
from zeda_jax.serve.app import make_app
from zeda_jax.serve.gate import Gate
from zeda_jax.serve.metrics import Metrics
from zeda_jax.serve.protocol import MAX_BIAS
from zeda_jax.serve.scoring import Scorer
from zeda_jax.serve.service import ServedModel, Service
from zeda_jax.serve.serving_engine import ServingEngine
from zeda_jax.serve.worker import Worker
from zeda_jax.sharding import Sharding, make_mesh

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
  """Of `zeda serve`; see cli/serve.py."""

  model: str
  host: str = "127.0.0.1"
  port: int = 8000
  api_key: str | None = None
  model_name: str | None = None
  num_slots: int = 16
  max_tokens: int | None = None
  max_length: int | None = None
  max_queue: int = 256
  max_body_bytes: int = 4 * 2**20
  zero_expert_bias: float = 0.0
  warmup_length: int = 1024
  drain_seconds: float = 300.0

  def __post_init__(self) -> None:
    for name in ("num_slots", "max_tokens", "max_length", "max_body_bytes"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ZedaError(f"--{name.replace('_', '-')} is {value}; expected at least 1.")
    for name in ("max_queue", "warmup_length", "drain_seconds"):
      if getattr(self, name) < 0:
        raise ZedaError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected at least 0.")
    if not 0 <= self.port < 2**16:
      raise ZedaError(f"--port is {self.port}; expected 0 (a free one) to 65535.")
    if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
      raise ZedaError("the API key is empty or has characters that no HTTP header can hold: choose another.")
    bias = self.zero_expert_bias
    if not (bias == float("-inf") or abs(bias) <= MAX_BIAS):  # NaN is neither
      raise ZedaError(
        f"--zero-expert-bias is {bias}; expected a number from -{MAX_BIAS:g} to {MAX_BIAS:g}, or -inf to switch the "
        "zero experts off."
      )

  @property
  def name(self) -> str:
    return self.model_name or pathlib.Path(self.model).resolve().name


def serve(options: Options, say: Say) -> int:
  """Serves until SIGTERM or Ctrl-C, then answers what was begun. Returns the exit status: 0, or 1 if the engine failed
  or requests had to be cut off.

  Args:
    options: see `Options`.
    say: prints a line for whoever started it.

  Raises:
    ZedaError: the directory or an option is wrong.
    OSError: the address cannot be used.
  """
  config, tokenizer = read_config(options.model), load_tokenizer(options.model)
  check_vocabulary(tokenizer, config.vocab_size, options.model)
  eos = eos_ids(options.model, tokenizer)
  with contextlib.closing(_bind(options.host, options.port)) as listener:  # before the model is read
    say(f"reading {options.model}")
    worker, service, gate = _prepare(options, tokenizer, eos, say)
    if options.api_key is None and not _is_loopback(options.host):
      say(f"warning: anyone who reaches {options.host} can use this server: --api-key=KEY asks for a key")
    worker.start()
    try:
      is_clean = asyncio.run(_run(gate, listener, options, say))
    finally:
      worker.stop()
      service.close()
    return 0 if is_clean and not worker.has_failed else 1


def _prepare(options: Options, tokenizer: Tokenizer, eos: tuple[int, ...], say: Say) -> tuple[Worker, Service, Gate]:
  """The engine, warm, and what is around it."""
  shards = len(jax.local_devices())
  slots = -(-options.num_slots // shards) * shards
  # The engine alone holds the model: it may keep its parameters in another form than they are read in.
  engine = ServingEngine(
    _load(options.model), num_slots=slots, max_tokens=options.max_tokens, max_length=options.max_length
  )
  config = engine.config
  kind = f"{config.num_zero_experts} zero experts beside {config.num_experts}" if config.is_dynamic else "static"
  device = jax.local_devices()[0].device_kind
  say(f"{config.model_type}, {kind}; {slots} slots, cache of {_cache_size(engine)}, on {shards} x {device}")
  _warm_up(engine, options, say)
  worker = Worker(engine, Scorer(engine.model, engine.longest, max_rows=slots // shards), _stop_this_process)
  served = ServedModel(
    options.name, tokenizer, eos, engine.longest, config.vocab_size, config.is_dynamic, options.zero_expert_bias
  )
  service = Service(served, worker, slots + options.max_queue)
  layers = [i for i, is_moe in enumerate(config.moe_layers) if is_moe]
  gate = make_app(service, Metrics(service, layers), options.api_key, options.max_body_bytes)
  return worker, service, gate


def _load(path: str) -> Decoder:
  """On all devices of this process, as generation wants it."""
  count = len(jax.local_devices())
  if count == 1:
    return load_hf(path)
  num_experts = read_config(path).num_experts
  sharding = Sharding(make_mesh(devices=jax.local_devices())).for_generation(num_experts)
  return reconfigured(load_hf(path, sharding=sharding.parameter), sharding=sharding)


def _cache_size(engine: ServingEngine) -> str:
  tokens = engine.statistics().num_pages * engine.page_size
  return f"{tokens} tokens ({engine.statistics().num_pages * engine.page_bytes / 2**20:.0f} MiB)"


def _warm_up(engine: ServingEngine, options: Options, say: Say) -> None:
  """Compiles what requests will need: decoding, and reading prompts of each padded length up to `warmup_length`, alone
  and several at once. What is longer is compiled when it first comes."""
  lengths = [1]
  while (length := 16 * 2 ** (len(lengths) - 1)) < min(2 * options.warmup_length, 2 * engine.longest):
    lengths.append(min(length, engine.longest - 1))
  if options.warmup_length == 0:
    return
  say(f"compiling for prompts of up to {max(lengths)} tokens")
  for length in dict.fromkeys(lengths):
    for count in (1, engine.num_slots):
      requests = [Request([0] * length, 1, temperature=t, n=1, stop_ids=()) for t in (1.0, *[0.0] * (count - 1))]
      for _ in engine.run(requests):
        pass
  for _ in engine.run([Request([0, 0, 0], 2, n=2, stop_ids=())]):  # a prompt whose last page is copied
    pass
  engine.forget_statistics()


def _bind(host: str, port: int) -> socket.socket:
  family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
  listener = socket.socket(family, kind, protocol)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind(address)
  except OSError as error:
    listener.close()
    raise OSError(error.errno, f"{error.strerror}; choose another with --host and --port", f"{host}:{port}") from None
  return listener


def _is_loopback(host: str) -> bool:
  return host == "localhost" or host.startswith("127.") or host == "::1"


def _stop_this_process() -> None:
  os.kill(os.getpid(), signal.SIGTERM)


class _Server(uvicorn.Server):
  """Without uvicorn's own handling of signals, which closes the door at once and ends with the signal's status."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


async def _run(gate: Gate, listener: socket.socket, options: Options, say: Say) -> bool:
  """Serves until a signal; whether all that was begun was answered."""
  config = uvicorn.Config(
    gate, lifespan="off", log_level="warning", access_log=False, timeout_keep_alive=75, timeout_graceful_shutdown=5
  )
  server, loop = _Server(config), asyncio.get_running_loop()
  stop, again = asyncio.Event(), asyncio.Event()

  def on_signal() -> None:
    (again if stop.is_set() else stop).set()

  for number in (signal.SIGTERM, signal.SIGINT):
    loop.add_signal_handler(number, on_signal)
  serving = asyncio.create_task(server.serve([listener]))
  while not (server.started or serving.done()):
    await asyncio.sleep(0.01)
  host, port = listener.getsockname()[:2]
  place = f"[{host}]" if ":" in host else host
  say(f"ready: http://{place}:{port}/v1 serves {options.name}")
  stopping = asyncio.create_task(stop.wait())
  await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
  gate.is_draining = True
  say(f"stopping: {gate.active} requests are being answered; the signal again cuts them off")
  is_clean = await _drained(gate, again, options.drain_seconds)
  if not is_clean:
    say(f"{gate.active} requests are cut off")
    server.force_exit = True
  server.should_exit = True
  await serving
  stopping.cancel()
  return is_clean


async def _drained(gate: Gate, again: asyncio.Event, seconds: float) -> bool:
  deadline = asyncio.get_running_loop().time() + seconds
  while gate.active and not again.is_set() and asyncio.get_running_loop().time() < deadline:
    await asyncio.sleep(0.02)
  return gate.active == 0
