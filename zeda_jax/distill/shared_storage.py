"""What several processes must have in common before a recipe starts: its inputs and the storage of its workdir."""

import copy
import json
import pathlib
import secrets
import socket
import time
from collections.abc import Mapping

import jax
import ml_collections

from zeda_jax.distributed.agreement import from_primary, together
from zeda_jax.errors import ZedaError

_PATIENCE = 10.0  # seconds that network storage may take to show a new file to other hosts


def check_same_inputs(config: ml_collections.ConfigDict, contents: Mapping[str, str]) -> None:
  """Checks that all processes have the same settings and read the same files.

  Args:
    config: the recipe; where its files lie may differ.
    contents: fingerprints of the files, by name.

  Raises:
    ZedaError: names a setting or file in which a process differs from the primary one; raised in all of them.
  """
  if jax.process_count() == 1:
    return
  settings = copy.deepcopy(config.to_dict())
  for section, name in ((settings, "teacher"), (settings, "prompts"), (settings["evaluate"], "prompts")):
    del section[name]
  # As JSON carries them.
  mine = json.loads(json.dumps({f"config.{k}": v for k, v in settings.items()} | dict(contents)))
  expected = from_primary(lambda: mine)

  def check() -> None:
    for name in mine:
      if mine[name] != expected.get(name) and name != "config.workdir":  # storage is checked by what is seen there
        raise ZedaError(
          f"host {socket.gethostname()} (process {jax.process_index()}) has another {name} than the host of process 0: "
          "run the same command on all hosts, on the same files."
        )

  together(check)


def check_shared(workdir: pathlib.Path) -> None:
  """Checks that all processes see what the primary one writes in `workdir`.

  Raises:
    ZedaError: one does not; raised in all of them.
  """
  if jax.process_count() == 1:
    return
  token = from_primary(lambda: secrets.token_hex(8))
  file = workdir / f".shared-{token}"

  def look() -> None:
    end = time.monotonic() + _PATIENCE
    while not (file.is_file() and file.read_text() == token):
      if time.monotonic() > end:
        raise ZedaError(
          f"config.workdir: host {socket.gethostname()} does not see what process 0 writes in {workdir}: use storage "
          "that all hosts share."
        )
      time.sleep(0.1)

  from_primary(lambda: file.write_text(token))
  try:
    together(look)
  finally:
    if jax.process_index() == 0:
      file.unlink(missing_ok=True)
