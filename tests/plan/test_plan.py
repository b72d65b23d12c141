"""Plans from shapes alone: memory by kind, rows and devices, suggestions, the command and its errors."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from tests.recipe_files import REPOSITORY
from zeda_jax.cli import main as cli
from zeda_jax.distill.recipe import default_config
from zeda_jax.errors import ZedaError
from zeda_jax.plan.aot import refusal
from zeda_jax.plan.apart import CompilerCrash
from zeda_jax.plan.chips import GIB, parse_topology
from zeda_jax.plan.models import MODELS, find_model
from zeda_jax.plan.plan import changed, faster_mesh, make_plan, suggestions

QWEN = find_model("qwen3_30b_a3b", "", "")[1]
PARAMETERS = 30.5e9


def plan_of(topology="v5p:4x4x4", stage="sft", model=QWEN, **settings):
  settings = {"sft.batch_size": 64, "sft.row_length": 8192, "mesh.expert": 4} | settings
  config = changed(default_config(), settings)
  return make_plan(config, "qwen", model, parse_topology(topology), stage, 1024, False), config


def test_what_lives_between_steps_is_held_once_in_the_mesh():
  plan, _ = plan_of()
  bytes_of = {kind: value * 64 / PARAMETERS for kind, value in plan.memory.items()}
  assert bytes_of["parameters"] == pytest.approx(2, rel=0.02)  # bfloat16
  assert bytes_of["teacher"] == pytest.approx(2, rel=0.02)
  assert bytes_of["optimizer"] == pytest.approx(12, rel=0.02)  # fp32: two moments and master weights
  assert plan.needed == pytest.approx(sum(plan.memory.values())) and plan.fits
  assert plan.source == "estimate"


def test_training_the_routers_holds_the_model_once():
  plan, _ = plan_of("v5p:2x2x1", **{"sft.batch_size": 4, "sft.trainable": "router"})
  assert plan.memory["teacher"] == pytest.approx(2 * PARAMETERS / 4, rel=0.02)
  assert plan.memory["parameters"] < 0.01 * plan.memory["teacher"]
  assert plan.memory["optimizer"] < 0.03 * plan.memory["teacher"]
  assert plan.fits


def test_skipping_cuts_experts_and_the_rows_of_the_student():
  plan, _ = plan_of()
  static, half = plan.times["0.0"], plan.times["0.5"]
  assert half.rows == pytest.approx(static.rows * (5 / 2 + 2) / 7)
  assert half.weights == static.weights and half.compute < static.compute and half.step < static.step
  experts = [plan.flops[r]["experts"] for r in ("0.0", "0.5")]
  assert 0.5 < experts[1] / experts[0] < 1  # the teacher skips nothing
  assert plan.tokens_per_second_per_chip("0.5") == 64 * 8192 / half.step / 64


def test_rows_are_padded_and_idle_devices_named():
  plan, _ = plan_of("v5e:16x16", **{"sft.batch_size": 128})
  assert (plan.padded_rows, plan.idle_devices) == (256, 128)
  full, _ = plan_of("v5e:16x16", **{"sft.batch_size": 256})
  assert full.idle_devices == 0
  assert full.times["0.0"] == plan.times["0.0"]  # idle devices save no time
  assert plan.step_flops("0.0") == pytest.approx(full.step_flops("0.0") / 2)


def test_more_parts_need_less_memory():
  whole, _ = plan_of(**{"sft.batch_size": 256})
  parts, _ = plan_of(**{"sft.batch_size": 256, "sft.accumulate": 4})
  assert parts.memory["activations"] == whole.memory["activations"] / 4
  assert parts.needed < whole.needed


def test_the_cheapest_change_that_fits_is_found():
  def again_with(topology, **settings):
    found, config = plan_of(topology, **settings)
    again = lambda config, compiling: make_plan(config, "q", QWEN, parse_topology(topology), "sft", 1024, compiling)
    return found, suggestions(found, config, QWEN, again)

  misfit, (changes, mended) = again_with("v6e:8x8", remat="none")
  assert not misfit.fits and mended.fits and changes == {"remat": "layer"}
  misfit, (changes, mended) = again_with("v5e:16x16", **{"sft.batch_size": 1024, "sft.row_length": 16384})
  assert not misfit.fits and mended.fits and set(changes) == {"sft.accumulate"}
  misfit, (changes, mended) = again_with("v5p:2x2x1", **{"sft.batch_size": 4})
  assert not misfit.fits and mended.fits and changes["sft.trainable"] == "router"
  misfit, nothing = again_with("v5e:2x2", **{"sft.batch_size": 4})
  assert not misfit.fits and nothing is None  # 61 GB do not go into 63 with anything beside them


def test_a_faster_mesh_is_named():
  found, config = plan_of("v5e:16x16", **{"sft.batch_size": 256})
  again = lambda config, _: make_plan(config, "q", QWEN, parse_topology("v5e:16x16"), "sft", 1024, False)
  best = faster_mesh(config, found, again)
  assert best.fits and best.mesh["expert"] != 4 and best.times["0.5"].step < found.times["0.5"].step
  assert faster_mesh(changed(config, {"mesh.expert": best.mesh["expert"]}), best, again) is None


def test_on_policy_rows():
  opd, _ = plan_of(stage="opd", **{"opd.max_new_tokens": 7168})
  assert (opd.rows, opd.row_length, opd.idle_devices) == (32, 8192, 32)


def test_a_teacher_that_does_not_run_is_held_and_costs_no_time():
  plan, alone = (plan_of(**{"sft.teacher_metrics": runs})[0] for runs in (True, False))
  assert alone.memory == plan.memory
  assert 0.7 < sum(alone.flops["0.0"].values()) / sum(plan.flops["0.0"].values()) < 0.85
  assert alone.times["0.5"].rows == pytest.approx(alone.times["0.0"].rows / 2)
  assert alone.times["0.5"].rows < plan.times["0.5"].rows and alone.times["0.5"].step < plan.times["0.5"].step
  kl = [plan_of(**{"sft.teacher_metrics": runs, "sft.loss": "forward_kl"})[0] for runs in (True, False)]
  assert kl[0].times == kl[1].times == plan.times


def test_sampling_ahead_holds_the_engine_beside_the_step():
  settings = {"opd.max_new_tokens": 7168, "mesh.expert": 4}
  plan, ahead = (plan_of(stage="opd", **settings, **{"opd.overlap": overlap})[0] for overlap in (False, True))
  more = {kind: value for kind, value in ahead.memory.items() if kind not in plan.memory}
  assert more.keys() == {"engine's parameters", "engine's cache"}
  # Experts over all 64 devices, everything else whole on each; pages for one response of 8192 tokens.
  others = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 192 * 2048) + 2 * 151936 * 2048
  experts = 48 * 128 * 3 * 2048 * 768
  assert more["engine's parameters"] == pytest.approx(2 * (others + experts / 64), rel=0.01)
  assert more["engine's cache"] == pytest.approx(8192 * 48 * 2 * 4 * 128 * 2, rel=0.01)
  assert ahead.needed == pytest.approx(plan.needed + sum(more.values()))
  assert ahead.settings["opd.overlap"] and ahead.times == plan.times


def test_on_one_device_the_engine_copies_what_is_trained():
  of = lambda trainable: plan_of("v5e:1x1", "opd", **{
    "mesh.expert": 1, "opd.max_new_tokens": 1024, "opd.overlap": True, "opd.trainable": trainable
  })[0].memory  # fmt: skip
  everything, routers = of("all"), of("router")
  assert everything["engine's parameters"] == pytest.approx(everything["parameters"])
  assert 0 < routers["engine's parameters"] < 0.01 * everything["engine's parameters"]


@pytest.mark.parametrize(
  "message, needed",
  [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 101.5G of 95.00G hbm. Exceeded", 101.5),
    (
      "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (96.50G) exceeds available HBM (95.00G)",
      103.6,
    ),
    ("RESOURCE_EXHAUSTED: something else", 95.0),
  ],
)
def test_what_the_compiler_refuses_does_not_fit(message, needed, monkeypatch):
  monkeypatch.setattr("zeda_jax.plan.plan.compile_apart", lambda job, devices: refusal(message))
  config = plan_of()[1]
  found = make_plan(config, "qwen", QWEN, parse_topology("v5p:4x4x4"), "sft", 1024, True)
  assert not found.fits and found.source == "compiled"
  assert found.needed / GIB == pytest.approx(needed, rel=2e-3)
  assert refusal("INTERNAL: Mosaic failed") is None


def test_where_the_compiler_crashes_the_plan_is_an_estimate_that_says_so(monkeypatch, capsys):
  def crash(job, devices):
    assert (job.program, job.topology, devices) == ("step", "v5p:4x4x4", 64)
    assert job.config["sft.row_length"] == 8192 and json.loads(json.dumps(dataclasses.asdict(job)))
    raise CompilerCrash("Check failed: a == b")

  expected, config = plan_of()
  monkeypatch.setattr("zeda_jax.plan.plan.compile_apart", crash)
  found = make_plan(config, "qwen", QWEN, parse_topology("v5p:4x4x4"), "sft", 1024, True)
  note = "The TPU compiler crashed on this plan (Check failed: a == b): these numbers are an estimate from shapes."
  assert found == dataclasses.replace(expected, note=note)
  monkeypatch.chdir(REPOSITORY)
  monkeypatch.setattr("zeda_jax.plan.aot.find_libtpu", lambda: True)
  flags = ["--config=configs/qwen3_30b_a3b.py", "--topology=v5p:4x4x4", "--config.sft.row_length=8192"]
  status, out = run(capsys, *flags)
  assert status == 0 and note in out.out and "fits" in out.out


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"mesh.expert": 3}, "data=-1 x expert=3 does not fit the 64 devices"),
    ({"mesh.data": 8, "mesh.expert": 4}, "product is 64"),
    ({"sft.row_length": 65536}, "65536 tokens exceed the model's context of 40960"),
  ],
)
def test_what_cannot_be_is_a_sentence(settings, message):
  with pytest.raises(ZedaError, match=message):
    plan_of(**settings)


def test_experts_that_cannot_be_spread():
  model = dataclasses.replace(QWEN, num_experts=96)
  with pytest.raises(ZedaError, match=r"96 experts.*expert=64 devices"):
    plan_of(model=model, **{"mesh.expert": 64})


def run(capsys, *arguments):
  status = cli.main(["plan", *arguments])
  return status, capsys.readouterr()


def test_the_command(capsys, monkeypatch):
  monkeypatch.chdir(REPOSITORY)
  flags = ["--config=configs/qwen3_30b_a3b.py", "--topology=v5p:4x4x4", "--estimate", "--config.mesh.expert=4"]
  status, out = run(capsys, *flags, "--json")
  plan = json.loads(out.out)
  assert status == 0 and plan["source"] == "estimate" and plan["model"] == "qwen3_30b_a3b"
  assert (plan["rows"], plan["row_length"], plan["mesh"]) == (128, 32768, {"data": 16, "expert": 4})
  status, out = run(capsys, *flags, "--config.remat=none")
  text = " ".join(out.out.split())
  assert status == 0 and "DOES NOT FIT" in text and "fits with --config.remat=layer" in text and "estimate" in text


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "--topology is missing"),
    (["--topology=v5p:4x4x4", "--config=configs/tiny.py"], "Which model is it"),
    (["--topology=v5p:4x4x4", "--model=llama"], "--model=llama is not known; expected one of qwen3_30b_a3b"),
    (["--topology=v5p:4x4x4", "--dynamic"], "--dynamic is about --stage=rollout"),
    (["--topology=v5q:4x4x4"], "'v5q' is no kind of TPU"),
    (["--topology=v5p:4x4x4", "--config.sft.rows=4"], "config.sft.rows does not exist"),
    (["--topology=v5p:4x4x4", "--config.teacher=nowhere"], "config.json does not exist"),
  ],
)
def test_what_the_command_refuses(arguments, message, capsys, monkeypatch):
  monkeypatch.chdir(REPOSITORY)
  arguments = ["--config=configs/glm_4_7_flash.py", "--estimate", *arguments]
  status, out = run(capsys, *arguments)
  assert status == 2 and message in out.err


def test_shapes_of_the_shipped_models():
  assert set(MODELS) == {file.stem for file in (REPOSITORY / "configs").glob("*.py")} - {"tiny"}
  glm = find_model(None, "", "configs/glm_4_7_flash.py")[1]
  assert glm.num_shared_experts == 1 and glm.moe_layers.count(False) == 1 and glm.mla is not None
  plan, _ = plan_of(model=glm)
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(_shapes(glm)))
  assert plan.memory["teacher"] * 64 == pytest.approx(2 * total, rel=0.02)
  assert np.isclose(total, 29.9e9, rtol=0.02)
  assert plan.available == 95 * GIB


def _shapes(model):
  from zeda_jax.models.decoder import abstract_decoder
  from zeda_jax.models.params import split_model

  return split_model(abstract_decoder(model))[1]
