"""Writes docs/config.md: every setting of the recipe, from the source that defines it.

python docs/config_reference.py           # writes the file
python docs/config_reference.py --check   # fails if it is not what would be written
"""

import ast
import importlib.util
import inspect
import io
import pathlib
import sys
import tokenize
from typing import Any

from zeda_jax.distill import recipe

DOCS = pathlib.Path(__file__).resolve().parent
CONFIGS = ("qwen3_30b_a3b", "glm_4_7_flash", "tiny")

HEAD = """# Settings

Every value of the recipe, as `--config.NAME=VALUE` of `zeda adapt` (and `rollout`, `sft`, `opd`, `export`, `plan`), or
a file like those in `configs/`. Defaults are those of `zeda_jax.default_config()`; where a shipped configuration has
another value, it stands beside. An unknown name or a value out of range is an error before any work.

This page is written by `python docs/config_reference.py`.
"""

SECTIONS = {
  "": "The run",
  "mesh": "Devices",
  "student": "The student",
  "rollout": "The teacher's rollouts",
  "sft": "First stage: SFT",
  "opd": "Second stage: on-policy distillation",
  "export": "Export",
  "evaluate": "Evaluation",
}


def comments(function: Any) -> dict[str, str]:
  """The comment behind each key of the nested dictionary that a function returns, by dotted name, in order."""
  source = inspect.getsource(function)
  of_line = {
    token.start[0]: token.string.removeprefix("#").strip()
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  body = ast.parse(source).body[0]
  named: dict[str, ast.Dict] = {}
  found: dict[str, str] = {}

  def walk(node: ast.Dict, prefix: str) -> None:
    for key, value in zip(node.keys, node.values, strict=True):
      if key is None:  # **name
        assert isinstance(value, ast.Name)
        walk(named[value.id], prefix)
        continue
      assert isinstance(key, ast.Constant)
      name = f"{prefix}{key.value}"
      if not isinstance(value, ast.Dict):
        found[name] = of_line.get(key.lineno, "")
      if isinstance(value, ast.Dict):
        walk(value, f"{name}.")

  for node in ast.walk(body):
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
      named[node.targets[0].id] = node.value  # type: ignore[attr-defined]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ConfigDict") and node.args:
      assert isinstance(node.args[0], ast.Dict)
      walk(node.args[0], "")
  return found


def settings_of(name: str) -> dict[str, Any]:
  """All settings of a file in configs/, by dotted name."""
  path = DOCS.parent / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return flat(module.get_config().to_dict())


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  out: dict[str, Any] = {}
  for name, value in tree.items():
    out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
  return out


def page() -> str:
  defaults, meaning = flat(recipe.default_config().to_dict()), comments(recipe.default_config)
  shipped = {name: settings_of(name) for name in CONFIGS}
  lines = [HEAD]
  for section, title in SECTIONS.items():
    lines += [f"\n## {title}\n", "| setting | default | shipped | meaning |", "|---|---|---|---|"]
    for name, text in meaning.items():
      default = defaults[name]
      if (name.partition(".")[0] if "." in name else "") != section:
        continue
      others = [f"{file}: {code(values[name])}" for file, values in shipped.items() if values[name] != default]
      lines.append(f"| `{name}` | {code(default)} | {'<br>'.join(others)} | {cell(text)} |")
  return "\n".join(lines) + "\n"


def code(value: Any) -> str:
  return "" if value is None or value == "" else f"`{value!r}`"


def cell(text: str) -> str:
  return text.replace("|", "\\|")


def main() -> int:
  file, text = DOCS / "config.md", page()
  if "--check" in sys.argv[1:]:
    if not file.is_file() or file.read_text() != text:
      print(f"{file} is not what `python docs/config_reference.py` writes: run it.", file=sys.stderr)
      return 1
    return 0
  file.write_text(text)
  return 0


if __name__ == "__main__":
  sys.exit(main())
