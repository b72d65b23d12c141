"""A server on this machine that answers /v1/completions as vLLM, SGLang or others would, and misbehaves on order.

What it "samples" depends on the prompt and the seed alone, so that a run can be compared with another one.
"""

import contextlib
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

WORDS = "the model answers a question about lists of numbers and then returns some other value with care".split()
BARE = ("bare", "sampling", "strict")
BARE_FIELDS = {
  *("model", "prompt", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed"),
  *("logprobs", "echo", "n", "stream", "stop"),
}


class Stub:
  """The server.

  Attributes:
    kind: vllm | vllm-old (ids as spelled tokens) | sglang | sglang-old (ids from /generate alone) | bare (text only) |
      strict (bare, refuses other fields) | sampling (bare, refuses other fields than those of sampling).
    requests: bodies of all POSTs, in order of arrival; `times` the moments.
    fault: (number of the POST, body) -> what to do instead of answering; see `_misbehave`.
    change: applied to the answer's choice and usage before it is sent.
  """

  def __init__(self, tokenizer: Any, kind: str = "vllm", eos: int | None = None):
    self.tokenizer, self.kind = tokenizer, kind
    self.eos = tokenizer.eos_token_id if eos is None else eos
    self.max_model_len: int | None = None
    self.models = ["teacher"]
    self.key = ""
    self.delay = 0.0
    self.bos: list[int] = []
    self.gives_usage = True
    self.fault: Callable[[int, Mapping[str, Any]], Any] = lambda number, body: None
    self.change: Callable[[dict[str, Any], dict[str, Any], Mapping[str, Any]], None] = lambda *_: None
    self.requests: list[Mapping[str, Any]] = []
    self.times: list[float] = []
    self.keys: list[str | None] = []
    self.at_work = self.most_at_work = 0
    self.lock = threading.Lock()

  def sample(self, prompt: Sequence[int], seed: int, max_tokens: int) -> list[int]:
    """Token ids, with EOS if it fits. Ids of servers that give them need not be what their text is tokenized to."""
    rng = np.random.default_rng([seed, *prompt])
    if self.kind in BARE:
      text = " ".join(rng.choice(WORDS, rng.integers(1, 8)).tolist())
      tokens = list(self.tokenizer(text)["input_ids"])
    else:
      plain = [t for t in range(len(self.tokenizer)) if t not in self.tokenizer.all_special_ids]
      tokens = rng.choice(plain, rng.integers(1, 24)).tolist()
    return [*tokens, self.eos][:max_tokens]

  def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
    prompt = body["prompt"]
    ids = [*self.bos, *(self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)]
    tokens = self.sample(ids, body.get("seed") or 0, body["max_tokens"])
    ended = tokens[-1] == self.eos
    said = tokens[:-1] if ended else tokens
    text = self.decode(said)
    if body.get("echo"):
      text = (prompt if isinstance(prompt, str) else self.decode(prompt)) + text
    choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": "stop" if ended else "length"}
    if body.get("logprobs") is not None:
      spelled = [f"token_id:{t}" for t in tokens] if self.kind == "vllm-old" else [self.decode([t]) for t in tokens]
      choice["logprobs"] = {"tokens": spelled, "token_logprobs": [-0.5 - i for i in range(len(tokens))]}
    if self.kind in ("vllm", "vllm-old"):
      choice["stop_reason"] = None
    if self.kind in ("sglang", "sglang-old"):
      choice["matched_stop"] = self.eos if ended else None
    if self.kind in ("vllm", "sglang") and body.get("return_token_ids"):
      choice |= {"token_ids": tokens, "prompt_token_ids": ids}
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
    self.change(choice, usage, body)
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice]} | (
      {"usage": usage} if self.gives_usage else {}
    )

  def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang's own interface."""
    sampling = body["sampling_params"]
    tokens = self.sample(body["input_ids"], sampling["sampling_seed"], sampling["max_new_tokens"])
    ended = tokens[-1] == self.eos
    reason = {"type": "stop", "matched": self.eos} if ended else {"type": "length", "length": len(tokens)}
    meta = {"finish_reason": reason, "prompt_tokens": len(body["input_ids"]), "completion_tokens": len(tokens)}
    meta["output_token_logprobs"] = [[-0.5 - i, t, None] for i, t in enumerate(tokens)]
    return {"text": self.decode(tokens[:-1] if ended else tokens), "meta_info": meta}

  def decode(self, tokens: Sequence[int]) -> str:
    return self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)

  def cards(self) -> dict[str, Any]:
    owner = {"vllm-old": "vllm", "sglang-old": "sglang", **dict.fromkeys(BARE, "someone")}.get(self.kind, self.kind)
    card = {"object": "model", "owned_by": owner}
    card |= {"max_model_len": self.max_model_len} if self.max_model_len else {}
    return {"object": "list", "data": [{"id": name, **card} for name in self.models]}

  @property
  def sampled(self) -> list[Mapping[str, Any]]:
    """The requests after those that check the server: they alone have the run's seeds."""
    return [body for body in self.requests if seed_of(body) > 100]


def seed_of(body: Mapping[str, Any]) -> int:
  return body["sampling_params"]["sampling_seed"] if "sampling_params" in body else body["seed"]


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  stub: Stub

  def log_message(self, *args: Any) -> None:
    pass

  def do_GET(self) -> None:
    if self._authorized():
      self._send(200, self.stub.cards())

  def do_POST(self) -> None:
    stub = self.stub
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    with stub.lock:
      number = len(stub.requests)
      stub.requests.append(body)
      stub.times.append(time.monotonic())
      stub.at_work += 1
      stub.most_at_work = max(stub.most_at_work, stub.at_work)
    try:
      self._answer(stub, number, body)
    finally:
      with stub.lock:
        stub.at_work -= 1

  def _answer(self, stub: Stub, number: int, body: Mapping[str, Any]) -> None:
    if not self._authorized():
      return
    native = self.path == "/generate" and stub.kind == "sglang-old"
    if not native and body["model"] not in stub.models:
      return self._send(404, {"object": "error", "message": f"The model `{body['model']}` does not exist."})
    unknown = body.keys() - BARE_FIELDS
    unknown -= {"top_k", "min_p", "repetition_penalty"} if stub.kind == "sampling" else set()
    if stub.kind in ("strict", "sampling") and unknown:
      return self._send(400, {"error": {"message": f"Unrecognized request argument supplied: {sorted(unknown)[0]}"}})
    fault = stub.fault(number, body)
    if fault is not None:
      return self._misbehave(fault)
    time.sleep(stub.delay)
    self._send(200, stub.generate(body) if native else stub.complete(body))

  def _misbehave(self, fault: Any) -> None:
    """An HTTP status (with headers), "reset", "close", "garbled", "half" or a number of seconds to say nothing."""
    if isinstance(fault, tuple):
      status, headers = fault
      self._send(status, {"error": {"message": f"not now, {self.headers.get('Authorization')}"}}, headers)
    elif fault == "reset":
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
      self.close_connection = True
      self.connection.close()
    elif fault == "close":
      self.close_connection = True
    elif fault == "garbled":
      self._send(200, b'{"choices": [{"text": ')
    elif fault == "half":
      self.send_response(200)
      self.send_header("Content-Length", "1000")
      self.end_headers()
      self.wfile.write(b'{"choices"')
      self.close_connection = True
    else:
      time.sleep(fault)
      self.close_connection = True

  def _authorized(self) -> bool:
    self.stub.keys.append(self.headers.get("Authorization"))
    if self.stub.key and self.headers.get("Authorization") != f"Bearer {self.stub.key}":
      self._send(401, {"error": {"message": f"Incorrect API key provided: {self.headers.get('Authorization')}"}})
      return False
    return True

  def _send(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    with contextlib.suppress(OSError):  # the client may be gone
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(data)))
      for name, text in (headers or {}).items():
        self.send_header(name, text)
      self.end_headers()
      self.wfile.write(data)


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, *args: Any) -> None:  # broken connections are what is tested
    pass


@contextlib.contextmanager
def serving(stub: Stub) -> Iterator[str]:
  """Serves in a thread; yields the address."""
  server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
  thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
