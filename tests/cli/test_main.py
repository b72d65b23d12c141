"""The command's face: help that fits a screen and is there at once, and errors as one sentence."""

import signal
import subprocess
import sys
import time

import pytest

from tests.recipe_files import REPOSITORY, zeda
from zeda_jax.cli import main as cli
from zeda_jax.errors import ZedaError

MAIN = "zeda_jax.cli.main"


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_fits_a_screen(command, capsys):
  try:
    status = cli.main([command, "--help"] if command else ["--help"])
  except SystemExit as leaving:  # argparse
    status = leaving.code
  text = capsys.readouterr().out
  lines = text.rstrip().splitlines()
  assert status == 0
  assert 8 <= len(lines) <= 40
  assert max(map(len, lines)) <= 100


def test_no_arguments_is_help(capsys):
  assert cli.main([]) == 0
  text = capsys.readouterr().out
  assert all(f"  {command}" in text for command in cli.COMMANDS)


@pytest.mark.parametrize(
  "arguments", [["--help"], ["adapt", "--help"], ["demo", "--help"], ["generate", "--help"], ["bench", "--help"]]
)
def test_help_does_not_import_jax(arguments):
  code = (
    f"import sys; from {MAIN} import main\ntry:\n  main({arguments!r})\nexcept SystemExit:\n  pass\n"
    "print('imported:', [m for m in ('jax', 'torch', 'transformers', 'orbax') if m in sys.modules])"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
  assert result.stdout.splitlines()[-1] == "imported: []"


def test_help_starts_fast():
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    assert zeda("adapt", "--help").returncode == 0
    seconds.append(time.perf_counter() - start)
  assert min(seconds) < 1.5


def test_wrong_setting_does_not_import_jax():
  flags = ["adapt", "--config=configs/tiny.py", "--config.sft.lr=1"]
  code = f"import sys; from {MAIN} import main; print(main({flags}), 'jax' in sys.modules)"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
  assert result.stdout.split() == ["2", "False"]
  assert result.stderr.count("\n") == 1 and "config.sft.lr does not exist" in result.stderr


def test_unknown_command(capsys):
  assert cli.main(["adopt"]) == 2
  found = capsys.readouterr()
  assert found.out == "" and "'adopt' is no command; expected one of" in found.err


@pytest.mark.parametrize(
  ("error", "status", "text"),
  [
    (ZedaError("what was found."), 2, "zeda inject: what was found.\n"),
    (PermissionError(13, "Permission denied", "/x/y"), 2, "zeda inject: /x/y: Permission denied.\n"),
    (KeyboardInterrupt(), 130, "zeda inject: interrupted; run the same command again to go on from what is saved.\n"),
  ],
)
def test_errors_are_one_sentence(monkeypatch, capsys, error, status, text):
  def fails(*args):
    raise error

  monkeypatch.setattr("zeda_jax.cli.inject.run", fails)
  assert cli.main(["inject", "a", "b"]) == status
  assert capsys.readouterr().err == text


def test_a_closed_pipe_is_no_error():
  command = f"{sys.executable} -m {MAIN} adapt --help | head -1"
  result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=REPOSITORY)
  assert result.stderr == "" and result.stdout.startswith("zeda adapt:")
  assert result.returncode in (0, 128 + signal.SIGPIPE)
