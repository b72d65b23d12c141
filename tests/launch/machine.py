"""Runs the launch scripts with made-up tools on PATH: no test talks to a cloud or a cluster."""

import os
import pathlib
import shlex
import subprocess

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
ADAPT = ["adapt", "--config=configs/tiny.py", "--config.teacher=/mnt/zeda/teacher", "--config.workdir=/mnt/zeda/a run"]


class Machine:
  """A directory of made-up tools, what was done with them, and a home directory."""

  def __init__(self, root: pathlib.Path):
    self.root, self.home = root, root / "home"
    (root / "bin").mkdir()
    self.home.mkdir()
    self.tool("sleep", "exec /bin/sleep 0.01")  # no test waits for a poll
    self.env = {
      **os.environ,
      "PATH": f"{root / 'bin'}:/usr/bin:/bin",
      "HOME": str(self.home),
      "USER": "Jane.Doe",
      "FAKE": str(root),
    }

  def tool(self, name: str, body: str) -> pathlib.Path:
    """A bash program on PATH; its calls are recorded."""
    file = self.root / "bin" / name
    record = "" if name == "sleep" else 'printf "%s\\n" "${0##*/} ${*@Q}" >>"$FAKE/calls"\n'
    file.write_text(f"#!/bin/bash\n{record}{body}\n")
    file.chmod(0o755)
    return file

  def file(self, name: str, text: str | None = None) -> str:
    """Writes or reads a file that the tools share with the test; one that is not there is empty."""
    path = self.root / name
    if text is not None:
      path.write_text(text)
    return path.read_text() if path.exists() else ""

  def calls(self, *words: str) -> list[list[str]]:
    """The calls that contain all the words."""
    lines = [shlex.split(line) for line in self.file("calls").splitlines()]
    return [call for call in lines if set(words) <= set(call)]

  def run(self, script: str, *args: str, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCH / script), *args]
    return subprocess.run(
      command, env={**self.env, **env}, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )


def commands(text: str) -> list[list[str]]:
  """The commands that a dry run printed, as a shell would split them."""
  return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]
