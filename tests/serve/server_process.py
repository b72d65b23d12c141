"""A real `zeda serve` process, and the model that it serves in the tests."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from typing import Self

import httpx
import prometheus_client.parser

from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.demo import TEACHER
from zeda_jax.models.decoder import inject

REPOSITORY = pathlib.Path(__file__).parents[2]
CONTEXT = 2048
SLOTS = 8  # of the server that the tests share


def write_model(path: pathlib.Path) -> pathlib.Path:
  """The demo's teacher with untrained zero experts, and a context long enough for requests that take a while."""
  teacher = path.parent / f"{path.name}-teacher"
  shutil.copytree(TEACHER, teacher)
  config = json.loads((teacher / "config.json").read_text())
  (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
  save_hf(inject(load_hf(teacher)), path)
  return path


class Server:
  """`zeda serve` from its start until it is ready; leaving the context ends it."""

  def __init__(self, model: pathlib.Path, *flags: str, **environment: str):
    command = [sys.executable, "-m", "zeda_jax.cli.main", "serve", str(model), "--port=0", *flags]
    variables = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", **environment}
    self.process = subprocess.Popen(
      command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY
    )
    self._lines: list[str] = []
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    assert self.process.stdout is not None
    for line in self.process.stdout:
      self._lines.append(line)

  @property
  def output(self) -> str:
    return "".join(self._lines)

  def wait_for(self, pattern: str, seconds: float = 240) -> re.Match[str]:
    deadline = time.monotonic() + seconds
    while not (found := re.search(pattern, self.output)):
      assert self.process.poll() is None and time.monotonic() < deadline, f"no {pattern!r} in:\n{self.output}"
      time.sleep(0.02)
    return found

  def __enter__(self) -> Self:
    try:
      self.root = self.wait_for(r"ready: (http://\S+)/v1 serves")[1]
    except BaseException:
      self.process.kill()
      raise
    self.url = f"{self.root}/v1"
    return self

  def __exit__(self, *error: object) -> None:
    if self.process.poll() is None:
      self.process.kill()
    self.process.wait()
    self._reader.join()

  def metrics(self) -> dict[str, float]:
    """Name, or name{layer}, to value."""
    page = httpx.get(f"{self.root}/metrics", timeout=60).raise_for_status().text
    families = prometheus_client.parser.text_string_to_metric_families(page)
    samples = [sample for family in families for sample in family.samples]
    return {s.name + "".join(f"{{{value}}}" for value in s.labels.values()): s.value for s in samples}

  def wait_until_idle(self, seconds: float = 30) -> dict[str, float]:
    """The metrics, once nothing is in flight any more."""
    deadline = time.monotonic() + seconds
    while (found := self.metrics())["zeda_in_flight_responses"] > 0:
      assert time.monotonic() < deadline, "responses are still in flight"
      time.sleep(0.05)
    return found
