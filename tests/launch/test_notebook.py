"""The Colab notebook: a clean file, cells that run, and the whole of it on a small demo."""

import json
import pathlib
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

import zeda_jax
from tests.launch.machine import LAUNCH
from zeda_jax.data.jsonl import write_jsonl
from zeda_jax.demo.families import mixed_tasks
from zeda_jax.demo.run import TEACHER

ROOT = LAUNCH.parent
NOTEBOOK = LAUNCH / "colab" / "zeda_jax_demo.ipynb"


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def with_parameters(notebook, tag, values):
  """Sets variables after the cell with the tag, as papermill does."""
  (at,) = [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]
  lines = [f"{name} = {value!r}" for name, value in values.items()]
  notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(lines)))


def execute(notebook, directory, timeout):
  NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(directory)}}).execute()
  return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def text_of(outputs):
  return "".join(output.text for output in outputs if output.output_type == "stream")


def types_of(outputs):
  return {kind for output in outputs if output.output_type == "display_data" for kind in output.data}


def test_file_is_valid_and_without_outputs(notebook):
  nbformat.validate(notebook)
  raw = json.loads(NOTEBOOK.read_text())
  for cell in raw["cells"]:
    if cell["cell_type"] == "code":
      assert (cell["outputs"], cell["execution_count"]) == ([], None)
      compile("".join(cell["source"]), cell["id"], "exec")
  assert raw["nbformat"] == 4 and "widgets" not in raw["metadata"]
  # The source is a setting at the top, before anything that takes time.
  first = next(cell for cell in notebook.cells if cell.cell_type == "code")
  assert 'SOURCE = "git+https://' in first.source


def test_cells_run_on_a_finished_demo(notebook, tmp_path):
  """All but the demo itself, on a workdir of the same shape whose student is the embedded teacher, injected."""
  main = tmp_path / "out" / "main"
  zeda_jax.save_hf(zeda_jax.inject(zeda_jax.load_hf(TEACHER)), main / "student")
  shutil.copy(ROOT / "docs" / "demo.png", main / "summary.png")
  (main / "summary.md").write_text("| model | average |\n|---|---|\n")
  (tmp_path / "out" / "data").mkdir()
  write_jsonl(tmp_path / "out" / "data" / "held-out.jsonl", mixed_tasks("held_out", 2))
  notebook.cells = [cell for cell in notebook.cells if "demo" not in cell.metadata.get("tags", [])]
  with_parameters(notebook, "parameters", {"WORKDIR": str(tmp_path / "out")})
  # Started in its own folder, as Jupyter does: it finds the clone and installs nothing.
  outputs = execute(notebook, NOTEBOOK.parent, timeout=120)
  assert outputs["install"] == []
  assert "cpu: cpu" in text_of(outputs["accelerator"])
  assert {"text/markdown", "image/png"} <= types_of(outputs["report"])
  said = text_of(outputs["generate"])
  assert [said.count(f"zero_expert_bias {bias}\n") for bias in ("-inf", "0.0", "1.0")] == [1, 1, 1]
  assert said.count("right: ") == 9 and said.count("; 0 % of the picks skipped") >= 3
  assert "Give MODEL and PROMPTS" in text_of(outputs["own"])


@pytest.mark.slow  # two dozen programs to compile
def test_whole_notebook(notebook, tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  write_jsonl(prompts, mixed_tasks("train", 16))
  with_parameters(notebook, "parameters", {"WORKDIR": str(tmp_path / "out"), "SMALL": True})
  small = {"sft.trainable": "router", "opd.trainable": "router", "rollout.max_new_tokens": 16, "opd.max_new_tokens": 16}
  small |= {"evaluate.max_new_tokens": 16, "evaluate.num_prompts": 16, "sft.row_length": 64, "sft.batch_size": 4}
  small |= {"opd.steps": 1, "rollout.batch_size": 16, "evaluate.batch_size": 16, "opd.prompts_per_step": 4}
  own = {"MODEL": str(TEACHER), "PROMPTS": str(prompts), "OWN_WORKDIR": str(tmp_path / "own"), "SETTINGS": small}
  with_parameters(notebook, "own-parameters", own)
  outputs = execute(notebook, NOTEBOOK.parent, timeout=1500)
  assert "seconds in all" in str(outputs["demo"])
  assert {"text/markdown", "image/png"} <= types_of(outputs["report"])
  assert text_of(outputs["generate"]).count("right: ") == 9
  assert "text/markdown" in types_of(outputs["own"])
  assert (pathlib.Path(tmp_path) / "own" / "student" / "config.json").is_file()
