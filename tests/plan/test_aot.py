"""Plans of compiled steps: a tiny model's in seconds, and the real models' by benchmarks/plan_tables.py."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.recipe_files import REPOSITORY
from zeda_jax.plan.models import MODELS

HAS_LIBTPU = (pathlib.Path(sys.prefix) / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None

pytestmark = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed; `make test-tpu-aot` installs it")


def plan(*arguments):
  """`zeda plan --json` in a process of its own, since libtpu wants one."""
  command = [sys.executable, "-m", "zeda_jax.cli.main", "plan", *arguments, "--json"]
  env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  child = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
  assert child.returncode == 0, child.stderr[-3000:]
  return json.loads(child.stdout)


def sent(found, kind):
  return sum(s["bytes"] for s in found["traffic"] if s["kind"] == kind)


def test_a_tiny_step_is_compiled_and_counted(tmp_path):
  small = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 1024}
  small |= {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 128}
  (tmp_path / "config.json").write_text(json.dumps(MODELS["qwen3_30b_a3b"] | small))
  flags = ["--config=configs/tiny.py", f"--config.teacher={tmp_path}", "--topology=v5e:2x2", "--config.mesh.expert=2"]
  flags += ["--config.sft.batch_size=4", "--config.sft.row_length=256", "--config.remat=layer"]
  compiled, estimate = plan(*flags), plan(*flags, "--estimate")
  assert compiled["source"] == "compiled" and compiled["fits"] and estimate["source"] == "estimate"
  held = ("parameters", "optimizer", "teacher")
  assert all(compiled["memory"][kind] == estimate["memory"][kind] > 0 for kind in held)
  # Rows of student and teacher, forward and backward, as the shapes say; the compiled loops are counted layer by layer.
  assert sent(compiled, "ragged-all-to-all") == pytest.approx(sent(estimate, "ragged-all-to-all"), rel=0.1)
  assert 0 < compiled["times"]["0.5"]["step"] < compiled["times"]["0.0"]["step"]


def test_a_tiny_engine_is_compiled(tmp_path):
  small = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 1024}
  small |= {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 128}
  (tmp_path / "config.json").write_text(json.dumps(MODELS["qwen3_30b_a3b"] | small))
  flags = ["--config=configs/tiny.py", f"--config.teacher={tmp_path}", "--topology=v5e:2x2", "--stage=rollout"]
  flags += ["--config.rollout.batch_size=8", "--config.rollout.max_new_tokens=128", "--prompt-tokens=128", "--dynamic"]
  compiled, estimate = plan(*flags), plan(*flags, "--estimate")
  assert compiled["source"] == "compiled" and compiled["fits"]
  rows = [sent(found["programs"]["prefill"], "ragged-all-to-all") for found in (compiled, estimate)]
  assert rows[0] == pytest.approx(rows[1], rel=0.1)
  assert sent(compiled["programs"]["decode"], "ragged-all-to-all") > 0  # in buffers of whole tiles, for a few rows
  assert all(p["temporaries"] > 0 for p in compiled["programs"].values())


@pytest.mark.tpu_aot
@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "glm_4_7_flash"])
@pytest.mark.parametrize("case", ["rollout-v5p", "rollout-v5p-dynamic", "rollout-v6e", "rollout-v6e-dynamic"])
def test_the_engine_of_the_real_models_fits_without_a_second_cache(case, model):
  from benchmarks.plan_tables import command

  compiled = plan(*command(model, case)[1:])
  estimate = plan(*command(model, case)[1:], "--estimate")
  assert compiled["source"] == "compiled" and compiled["fits"], compiled
  assert compiled["needed"] == pytest.approx(estimate["needed"], rel=0.15)
  for name, program in compiled["programs"].items():
    assert program["temporaries"] < 0.25 * compiled["memory"]["cache"], name
    rows = [sent(found["programs"][name], "ragged-all-to-all") for found in (compiled, estimate)]
    assert rows[0] == pytest.approx(rows[1], rel=0.1), name
    others = sum(s["bytes"] for s in program["traffic"] if s["kind"] != "ragged-all-to-all")
    assert others < 0.05 * rows[0]  # matrices and the cache stay where they are


@pytest.mark.tpu_aot
@pytest.mark.parametrize("model", ["qwen3_30b_a3b", "glm_4_7_flash"])
@pytest.mark.parametrize("case", ["v5p", "v6e", "v5e", "router"])
def test_the_real_models_fit_and_gather_as_expected(case, model):
  from benchmarks.plan_tables import command

  compiled = plan(*command(model, case)[1:])
  estimate = plan(*command(model, case)[1:], "--estimate")
  assert compiled["source"] == "compiled" and compiled["fits"], compiled
  assert compiled["row_length"] >= 8192 and compiled["idle_devices"] == 0
  assert compiled["needed"] == pytest.approx(estimate["needed"], rel=0.35)
  # What could be gathered or cut is not all-reduced, but for parts that are no whole tiles: embeddings over 64 devices,
  # and on 256 devices some gradients.
  left = 0.2 if case == "v5e" else 0.05
  assert sent(compiled, "all-reduce") < left * sent(compiled, "all-gather"), compiled["traffic"]
  for kind in ("all-gather", "ragged-all-to-all", "all-to-all"):  # numbers of rows are exchanged beside them
    assert sent(compiled, kind) == pytest.approx(sent(estimate, kind), rel=0.15, abs=1e8), kind
