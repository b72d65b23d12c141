"""--config and its overrides: what is accepted, and a sentence for everything else."""

import sys

import pytest

from tests.recipe_files import REPOSITORY
from zeda_jax.cli.config_flags import parse_config
from zeda_jax.errors import ZedaError

DEFAULT = "from zeda_jax import default_config\ndef get_config():\n  c = default_config()\n"
TINY = f"--config={REPOSITORY / 'configs' / 'tiny.py'}"


def test_values_of_every_kind():
  config = parse_config(
    "adapt",
    [
      TINY,
      "--config.teacher=/some/where",
      "--config.sft.weight=3",
      "--config.sft.epochs=2",
      "--config.export.plain=true",
      "--config.student.num_zero_experts=5",
      "--config.evaluate.models=('teacher','student')",
    ],
  )
  assert config.teacher == "/some/where"
  assert (config.sft.weight, config.sft.epochs, config.export.plain) == (3.0, 2, True)
  assert isinstance(config.sft.weight, float)
  assert config.student.num_zero_experts == 5 and config.student.num_experts_per_tok is None
  assert config.evaluate.models == ("teacher", "student")


def test_values_behind_a_space():
  config = parse_config("adapt", ["--config", TINY.split("=")[1], "--config.seed", "3", "--config.sft.weight", "4"])
  assert (config.seed, config.sft.weight) == (3, 4.0)


def test_argv_is_as_before():
  before = list(sys.argv)
  parse_config("adapt", [TINY, "--config.seed=3"])
  with pytest.raises(ZedaError):
    parse_config("adapt", [TINY, "--config.seed=x"])
  assert sys.argv == before


@pytest.mark.parametrize(
  ("flag", "expected"),
  [
    ("--config.sft.epoch=2", "config.sft.epoch does not exist; did you mean config.sft.epochs?"),
    ("--config.learning_rate=1", "did you mean config.sft.optimizer.learning_rate?"),
    ("--config.opd.qqqqqq=1", "config.opd.qqqqqq does not exist; expected one of opd."),
    ("--config.zzz=1", "config.zzz does not exist; expected one of dtype, evaluate"),
    ("--config.sft.epochs=many", "--config.sft.epochs=many"),
    ("--config.sft.epochs=1.5", "--config.sft.epochs=1.5"),
    ("--config.sft=3", "--config.sft=3"),
    ("--confg.seed=3", "confg"),
    ("stray", "'stray' is no option of zeda adapt"),
  ],
)
def test_wrong_flags(flag, expected):
  with pytest.raises(ZedaError) as error:
    parse_config("adapt", [TINY, flag])
  assert expected in str(error.value)
  assert "\n" not in str(error.value)


def test_no_config_file():
  with pytest.raises(ZedaError, match="--config is missing"):
    parse_config("adapt", ["--config.seed=1"])
  with pytest.raises(ZedaError, match=r"nowhere\.py does not exist"):
    parse_config("adapt", ["--config=nowhere.py"])
  with pytest.raises(ZedaError, match="does not exist"):
    parse_config("adapt", [f"--config={REPOSITORY}"])


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("def get_config():\n  raise RuntimeError('boom')", "RuntimeError: boom"),
    ("def get_config(:", "SyntaxError"),
    ("import no_such_module", "No module named 'no_such_module'"),
    ("x = 1", "has no attribute 'get_config'"),
    ("def get_config():\n  return {'a': 1}", "get_config"),
    (DEFAULT + "  c.sft.rowlength = 3\n  return c", 'Did you mean "row_length"'),
    (DEFAULT + "  c.sft.update(epoch=3)\n  return c", 'Did you mean "epochs"'),
  ],
)
def test_files_that_fail(tmp_path, text, expected):
  file = tmp_path / "mine.py"
  file.write_text(text)
  with pytest.raises(ZedaError) as error:
    parse_config("adapt", [f"--config={file}"])
  assert expected in str(error.value) and str(file) in str(error.value)
  assert "\n" not in str(error.value)
