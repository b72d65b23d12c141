"""The whole model's benchmark: what is measured at a tiny size, and the table's arithmetic."""

import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.bench.tiny import hasty
from tests.tiny_models import tiny_config
from zeda_jax.analysis.flops import theoretical_speedup
from zeda_jax.bench import model_table
from zeda_jax.bench.model import _Bench, bench_model, resolved
from zeda_jax.bench.model_options import PAPER, ModelOptions, PaperCell, find_geometry, with_layers
from zeda_jax.bench.model_table import ModelReport, ModelRow
from zeda_jax.bench.model_weights import check_memory, checkpoint_twins, random_twins
from zeda_jax.bench.timing import Timing
from zeda_jax.checkpoint.huggingface import save_hf
from zeda_jax.cli import main as cli
from zeda_jax.config import from_hf
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.plan.models import MODELS

QWEN = from_hf(MODELS["qwen3_30b_a3b"])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint") / "model"
  save_hf(Decoder(tiny_config(), rngs=nnx.Rngs(0)), path)
  return str(path)


@pytest.fixture(scope="module")
def report(directory):
  with hasty():
    return bench_model(ModelOptions(directory, layers=1, lengths=(24,), steps=4, slots=2, repeats=2))


def test_both_stages_are_measured_at_about_the_ratio_that_was_asked_for(report):
  assert "model, 1 of 2 layers" in report.title
  assert [(r.stage, r.length) for r in report.rows] == [("prefill", 24), ("decode", 24)]
  for row in report.rows:
    assert 0.2 < row.zero_ratio < 0.8
    assert 0 < row.static.minimum <= row.static.median and 0 < row.dynamic.minimum <= row.dynamic.median
    assert row.paper is None  # it measured another model
    config = tiny_config(num_zero_experts=tiny_config().num_experts // 2)
    assert row.theory == theoretical_speedup(config, row.length, row.zero_ratio, row.stage)


def test_the_last_layers_experts_are_run():
  """Or there would be nothing to measure of one layer: the engine's own prefill leaves them out."""
  config = tiny_config(stack_layers=False).replace(moe_layers=(True,))
  bench = _Bench(*random_twins(config), ModelOptions(lengths=(24,), steps=2))
  read = bench.prefill(bench.static, 24, 0.0)
  few, many = (jax.tree.map(lambda x: x, read.params) for _ in range(2))
  few["runs"][0]["mlp"]["experts"] = jax.tree.map(jnp.zeros_like, read.params["runs"][0]["mlp"]["experts"])
  outputs = []
  for params in (few, many):
    read.params = params
    outputs.append(np.asarray(read.again()[1]))
  assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_the_static_twin_has_the_same_arrays_and_no_zero_rows():
  config = tiny_config()
  static, dynamic = random_twins(config)
  assert dynamic.config.num_zero_experts == config.num_experts // 2 and not static.config.is_dynamic
  shared = {id(x) for x in jax.tree.leaves(dynamic.params)}
  assert all(id(x) in shared for x in jax.tree.leaves(static.params))
  router = static.params["runs"][0]["mlp"]["router"]
  assert "zero_weight" not in router and "zero_weight" in dynamic.params["runs"][0]["mlp"]["router"]
  weight = dynamic.params["runs"][0]["mlp"]["experts"]["gate_up"]
  assert abs(float(weight.mean())) < 0.1 * float(weight.std())
  assert float(weight.std()) == pytest.approx(config.hidden_size**-0.5, rel=0.05)


def test_the_first_layers_of_a_checkpoint(directory):
  static, dynamic = checkpoint_twins(directory, 1, "float32", unstack=True)
  assert static.config.num_layers == dynamic.config.num_layers == 1 and dynamic.config.is_dynamic
  whole = checkpoint_twins(directory, None, "float32", unstack=False)[1]
  stacked = whole.params["runs"][0]["mlp"]["experts"]["down"]
  assert (dynamic.params["runs"][0]["mlp"]["experts"]["down"][0] == stacked[0]).all()


def test_fewer_layers_keep_the_heads_share():
  cut = with_layers(QWEN, 2)
  assert cut.num_layers == 2 and cut.vocab_size == 151936 * 2 // 48 // 128 * 128
  assert with_layers(QWEN, None) is QWEN and with_layers(QWEN, 48) is QWEN
  glm = with_layers(from_hf(MODELS["glm_4_7_flash"]), 1)
  assert glm.moe_layers == (True,)  # not the dense one that comes first
  with pytest.raises(ZedaError, match="layers is 49; the model has 48"):
    with_layers(QWEN, 49)


def test_the_papers_theory_is_ours():
  assert len(PAPER) == 16
  for (stage, length), cell in PAPER.items():
    assert theoretical_speedup(QWEN, length, 0.5, stage) == pytest.approx(cell.theory, abs=6e-4), (stage, length)


def made_report():
  paper = PaperCell(1.403, 1.141)
  fast = ModelRow("prefill", 1024, 0.5, Timing(1.4, 1.2), Timing(1.0, 0.9), 1.4, paper)
  slow = ModelRow("decode", 1024, 0.48, Timing(1.1, 1.0), Timing(1.0, 1.0), 1.43, PaperCell(1.443, 1.233))
  return ModelReport("title", ("about",), (fast, slow))


def test_the_tables_numbers(tmp_path):
  made = made_report()
  assert model_table.summary(made) == (
    "1 of 2 cells reach 0.9 of the theoretical speed-up; 1 of 2 lie above the paper's measured speed-up"
  )
  texts = model_table.cells(made.rows[0])
  assert texts[4:] == ["0.500", "1.400", "1.400", "1.00", "1.403", "1.141", "0.81"]
  assert "| decode | 1024 | 1.1 s / 1 s | 1 s / 1 s | 0.480 | 1.100 | 1.430 | 0.77 |" in model_table.markdown(made)
  rows = list(csv.DictReader(io.StringIO(model_table.comma_separated(made))))
  assert float(rows[1]["speedup"]) == pytest.approx(1.1) and rows[0]["paper_measured"] == "1.141"
  files = model_table.write(made, tmp_path, "model")
  assert [file.name for file in files] == ["model.csv", "model.md"]
  with pytest.raises(ZedaError, match="already exists"):
    model_table.write(made, tmp_path, "model")


def test_defaults_of_a_cpu():
  found = resolved(ModelOptions())
  assert (found.layers, found.dtype, found.lengths) == (1, "float32", (1024, 2048, 4096, 8192))
  assert resolved(ModelOptions("somewhere")).layers is None


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--layers=0"], "layers is 0; expected at least 1"),
    (["--ratio=1"], "ratio is 1; expected a share"),
    (["--lengths=1,2"], "lengths are the numbers of tokens"),
    (["--lengths=many"], "--lengths=many is no list of numbers"),
    (["--stages=training"], "stage 'training' is unknown"),
    (["--dtype=int8"], "dtype is 'int8'"),
    (["--model=nowhere"], "--model=nowhere is neither one of qwen3_30b_a3b, glm_4_7_flash nor"),
    (["--lengths=40960"], "16 steps more exceed the model's context of 40960"),
  ],
)
def test_what_the_command_refuses(flags, message, capsys):
  assert cli.main(["bench", "model", *flags]) == 2
  assert message in capsys.readouterr().err


def test_too_little_memory_is_a_sentence(monkeypatch):
  monkeypatch.setattr("zeda_jax.bench.model_weights.free_bytes", lambda: 2.0**30)
  check_memory(2.0**29, "the parameters")
  with pytest.raises(ZedaError, match=r"the parameters need 2.0 GiB and 1.0 are free: give fewer --layers"):
    check_memory(2.0**31, "the parameters")


def test_names_and_directories():
  assert find_geometry("qwen3_30b_a3b")[1] == QWEN
