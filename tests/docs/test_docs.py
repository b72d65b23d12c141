"""The documentation: it builds without a warning, its settings exist, its Python runs."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import zeda_jax
from zeda_jax.cli.main import COMMANDS
from zeda_jax.ops import grouped_matmul

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEACHER = ROOT / "zeda_jax" / "demo" / "teacher"


def blocks(language):
  """(page:line, text) of all code blocks of a language."""
  for page in PAGES:
    text = page.read_text()
    for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
      yield pytest.param(match[1], id=f"{page.name}:{text[: match.start()].count(chr(10)) + 1}")


def run(*command):
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "NO_MKDOCS_2_WARNING": "1"}
  return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_the_site_builds_without_warnings(tmp_path):
  result = run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"))
  assert result.returncode == 0, result.stdout + result.stderr
  assert "group_balance_loss" in (tmp_path / "site" / "api" / "index.html").read_text()


def test_the_settings_page_is_that_of_the_source():
  result = run(sys.executable, "docs/config_reference.py", "--check")
  assert result.returncode == 0, result.stderr
  rows = [line for line in (ROOT / "docs" / "config.md").read_text().splitlines() if line.startswith("| `")]
  assert len(rows) > 70
  assert [row for row in rows if not row.split(" | ")[-1].strip(" |")] == []  # each says what it means


def test_every_page_is_in_the_navigation():
  navigation = (ROOT / "mkdocs.yml").read_text()
  assert [page.name for page in PAGES[1:] if f": {page.name}\n" not in navigation] == []


def names_of(tree, prefix=""):
  for name, value in tree.items():
    yield from names_of(value, f"{prefix}{name}.") if isinstance(value, dict) else (f"{prefix}{name}",)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_and_commands_exist(page):
  text = page.read_text()
  known = set(names_of(zeda_jax.default_config().to_dict())) | {"NAME"}
  assert set(re.findall(r"--config\.([A-Za-z_.]+)", text)) - known == set()
  shell = "\n".join(block.values[0] for block in blocks("bash"))
  commands = re.findall(r"^(?:\.venv/bin/)?zeda ([a-z-]+)", shell, re.MULTILINE)
  assert set(commands) - set(COMMANDS) == set()


@pytest.fixture
def student(tmp_path):
  """A dynamic checkpoint where the pages have theirs."""
  path = tmp_path / "student"
  zeda_jax.save_hf(zeda_jax.inject(zeda_jax.load_hf(TEACHER)), path)
  return path


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, student, monkeypatch):
  monkeypatch.setattr(grouped_matmul, "BACKENDS", dict(grouped_matmul.BACKENDS))
  keys = jax.random.split(jax.random.key(0))
  given = {
    "rows": jax.random.normal(keys[0], (6, 8)),
    "matrices": jax.random.normal(keys[1], (2, 8, 4)),
    "group_sizes": jnp.array([3, 2]),
  }
  code = code.replace("/runs/qwen3-half/student", str(student)).replace("/models/Qwen3-30B-A3B", str(TEACHER))
  exec(compile(code, "page", "exec"), given)
  if "out = grouped_matmul(" in code:
    assert given["out"].shape == (6, 4) and not given["out"][5].any()
  if "samples = " in code:
    assert 0 < len(given["samples"][0].tokens) <= 32
