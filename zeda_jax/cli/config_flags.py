"""--config=FILE.py and --config.a.b=value, with errors that name the near match, and flags of several processes."""

import difflib
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from zeda_jax.errors import ZedaError

_PROCESS_FLAGS = {"--coordinator": str, "--num-processes": int, "--process-id": int}


def take_process_flags(args: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
  """Splits the arguments into those of `distributed.initialize` and all others.

  Raises:
    ZedaError: a number is none, or a value is missing.
  """
  taken: dict[str, Any] = {}
  rest: list[str] = []
  waiting = iter(args)
  for arg in waiting:
    flag, equals, value = arg.partition("=")
    if flag not in _PROCESS_FLAGS:
      rest.append(arg)
      continue
    value = value if equals else next(waiting, "")
    kind = _PROCESS_FLAGS[flag]
    try:
      if not value:
        raise ValueError
      taken[flag.removeprefix("--").replace("-", "_")] = kind(value)
    except ValueError:
      expected = "HOST:PORT of process 0" if kind is str else "a whole number"
      raise ZedaError(f"{flag} is {value!r}; expected {expected}.") from None
  return taken, rest


def parse_config(command: str, args: Sequence[str]) -> ml_collections.ConfigDict:
  """The configuration that the arguments describe.

  Raises:
    ZedaError: no --config, a file that does not exist or fails, an unknown setting or a value of the wrong type.
  """
  args = _joined(args)
  given = [a.split("=", 1)[1] for a in args if a.startswith("--config=")]
  if not given:
    raise ZedaError("--config is missing; give a file such as --config=configs/tiny.py.")
  file = given[-1]
  if not pathlib.Path(file.split(":")[0]).is_file():
    raise ZedaError(f"--config={file} does not exist; expected a Python file with get_config().")
  try:
    defaults = _parse([f"--config={file}"])[0]
  except Exception as error:  # the file is the user's own program
    raise ZedaError(f"--config={file} fails ({type(error).__name__}: {_first_sentence(error)}): mend it.") from error
  if not isinstance(defaults, ml_collections.ConfigDict):
    raise ZedaError(
      f"--config={file}: get_config() gives {type(defaults).__name__}; expected the ConfigDict of "
      "zeda_jax.default_config(), changed as you like."
    )
  _check_names(args, defaults)
  try:
    config, rest = _parse(args)
  except (AttributeError, flags.Error, TypeError, ValueError) as error:
    raise ZedaError(" ".join(str(error).split()).rstrip(".") + ".") from error
  if rest:
    raise ZedaError(f"{rest[0]!r} is no option of zeda {command}; settings are given as --config.name=value.")
  return config


def _joined(args: Sequence[str]) -> list[str]:
  """Turns `--config.a value` into `--config.a=value`."""
  joined: list[str] = []
  for arg in args:
    if joined and joined[-1].startswith("--config") and "=" not in joined[-1] and not arg.startswith("--"):
      joined[-1] += f"={arg}"
    else:
      joined.append(arg)
  return joined


def _parse(args: Sequence[str]) -> tuple[Any, list[str]]:
  """(the configuration, arguments that are no flags)."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  sys.modules.pop("config_config", None)  # what ml_collections calls the file; it would keep names of the one before
  # ml_collections looks for the overrides in sys.argv.
  before, sys.argv = sys.argv, ["zeda", *args]
  try:
    rest = values(sys.argv)[1:]
    return values.config, rest
  finally:
    sys.argv = before


def _first_sentence(error: Exception) -> str:
  content: Any = error
  while isinstance(content, Exception) and len(content.args) == 1:
    content = content.args[0]  # str() of a KeyError is quoted, and ml_collections wraps one in another
  text = " ".join(str(content).split())
  near = text.find("Did you mean")
  text = text.split(". ")[0] + (f"; {text[near:]}" if near > 0 else "")
  return text.rstrip(". ")


def _names(tree: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
  for name in tree:
    value = tree.get(name)  # a placeholder without a value gives None here and raises elsewhere
    yield prefix + name
    if isinstance(value, ml_collections.ConfigDict):
      yield from _names(value, f"{prefix}{name}.")


def _check_names(args: Sequence[str], defaults: ml_collections.ConfigDict) -> None:
  known = list(_names(defaults))
  for arg in args:
    name = arg.removeprefix("--config.").split("=", 1)[0]
    if not arg.startswith("--config.") or name in known:
      continue
    section, _, leaf = name.rpartition(".")
    beside = [k for k in known if k.rpartition(".")[0] == section] or [k for k in known if "." not in k]
    near = difflib.get_close_matches(name, known, 1, 0.6) or [k for k in known if k.rpartition(".")[2] == leaf][:1]
    hint = f"did you mean config.{near[0]}?" if near else f"expected one of {', '.join(beside)}."
    raise ZedaError(f"config.{name} does not exist; {hint}")
