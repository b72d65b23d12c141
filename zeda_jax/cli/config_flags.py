"""--config=FILE.py and --config.a.b=value, with errors that name the near match."""

import difflib
import pathlib
import sys
from collections.abc import Iterator, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from zeda_jax.errors import ZedaError


def parse_config(command: str, args: Sequence[str]) -> ml_collections.ConfigDict:
  """The configuration that the arguments describe.

  Raises:
    ZedaError: no --config, a file that does not exist, an unknown setting or a value of the wrong type.
  """
  given = [a.split("=", 1)[1] for a in args if a.startswith("--config=")]
  if not given:
    raise ZedaError("--config is missing; give a file such as --config=configs/tiny.py.")
  if not pathlib.Path(given[-1].split(":")[0]).is_file():
    raise ZedaError(f"--config={given[-1]} does not exist; expected a Python file with get_config().")
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  argv = [f"zeda {command}", *args]
  # ml_collections looks for the overrides in sys.argv.
  before, sys.argv = sys.argv, argv
  try:
    rest = values(argv)
    if len(rest) > 1:
      raise ZedaError(f"{rest[1]!r} is no option of zeda {command}; settings are given as --config.name=value.")
    return values.config
  except AttributeError as error:
    raise ZedaError(_unknown_setting(args, given[-1])) from error
  except (flags.Error, TypeError) as error:
    raise ZedaError(str(error).replace("\n", " ").rstrip(".") + ".") from error
  finally:
    sys.argv = before


def _names(tree: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
  for name in tree:
    # get_ref-free access, so that a placeholder without a value does not raise
    value = tree.get(name)
    yield prefix + name
    if isinstance(value, ml_collections.ConfigDict):
      yield from _names(value, f"{prefix}{name}.")


def _unknown_setting(args: Sequence[str], file: str) -> str:
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  before, sys.argv = sys.argv, ["zeda", f"--config={file}"]
  try:
    values(sys.argv)
  finally:
    sys.argv = before
  known = list(_names(values.config))
  for arg in args:
    name = arg.removeprefix("--config.").split("=", 1)[0]
    if arg.startswith("--config.") and name not in known:
      section, _, leaf = name.rpartition(".")
      beside = [k for k in known if k.rpartition(".")[0] == section]
      near = difflib.get_close_matches(name, known, 1, 0.6) or [k for k in known if k.rpartition(".")[2] == leaf][:1]
      hint = f"did you mean config.{near[0]}?" if near else f"config.{section} has {', '.join(beside)}."
      return f"config.{name} does not exist; {hint}"
  return f"{file} sets a name that the recipe does not have."
