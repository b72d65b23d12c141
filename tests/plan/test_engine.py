"""Plans of the rollout engine: its programs' shapes are the engine's own, memory, room and times."""

import inspect
import json

import jax
import pytest
from flax import nnx

from tests.recipe_files import REPOSITORY
from tests.tiny_models import tiny_config
from zeda_jax.cli import main as cli
from zeda_jax.distill.recipe import default_config
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.plan.apart import CompilerCrash
from zeda_jax.plan.chips import GIB, parse_topology
from zeda_jax.plan.engine import fewer_slots, make_engine_plan
from zeda_jax.plan.generation import Load, engine_program
from zeda_jax.plan.models import find_model
from zeda_jax.plan.plan import changed
from zeda_jax.plan.steps import abstract_models
from zeda_jax.rollout import engine as engines
from zeda_jax.rollout.engine import Engine
from zeda_jax.rollout.requests import Request
from zeda_jax.sharding import Sharding, make_mesh

QWEN = find_model("qwen3_30b_a3b", "", "")[1]


def plan_of(topology="v5p:2x2x1", model=QWEN, dynamic=False, **settings):
  config = changed(default_config(), {"rollout.batch_size": 128, "rollout.max_new_tokens": 7168} | settings)
  again = lambda config, compiling: make_engine_plan(
    config, "qwen", model, parse_topology(topology), 1024, compiling, dynamic
  )
  return again(config, False), config, again


class Captured(Exception):
  pass


def test_the_programs_are_the_engines(monkeypatch):
  sharding = Sharding(make_mesh(1, 1, devices=jax.devices()[:1])).for_generation(8)
  config = tiny_config(sharding=sharding)
  load = Load(slots=3, prompt=40, new=30, page_size=16, chunk_steps=4, prefill_tokens=128)
  sizes = {"page_size": 16, "chunk_steps": 4, "prefill_tokens": 128}
  engine = Engine(
    Decoder(config, rngs=nnx.Rngs(0)), num_slots=3, max_tokens=3 * 80, max_length=70, unstack_layers=False, **sizes
  )
  for stream in range(3):
    engine.add(Request([1] * 40, 30, stream=stream, stop_ids=()))

  def capture(*arguments, **static):
    raise Captured(arguments, static)

  models = abstract_models(default_config(), config, sharding)
  step = {"prefill": engine.step, "decode": lambda: engine._decode(engine._scheduler.running)}
  engine._read(engine._scheduler.plan_prefill())
  engine.cancel(0), engine.cancel(1), engine.cancel(2)
  for stream in range(3):
    engine.add(Request([1] * 40, 30, stream=stream, stop_ids=()))
  for name in ("prefill", "decode"):
    monkeypatch.setattr(engines, name, capture)
    with pytest.raises(Captured) as captured:
      step[name]()
    theirs, static = captured.value.args
    _, ours, our_static = engine_program(name, models, load, sharding, dynamic=False)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert static == our_static
    assert kinds(theirs[1:]) == kinds(ours[1:]), name


def test_defaults_are_the_engines():
  defaults = {name: p.default for name, p in inspect.signature(Engine).parameters.items()}
  load = Load(1, 1, 1)
  for name in ("page_size", "chunk_steps", "prefill_tokens"):
    assert getattr(load, name) == defaults[name]


def test_buckets_and_pages():
  assert [Load(1, n, 1).bucket(1) for n in (1, 17, 18, 1024, 1025, 1026)] == [16, 16, 32, 1024, 1024, 2048]
  packed = Load(64, 401, 1)  # 2048 tokens at once: 5 prompts, or 1 on each of 4 devices
  assert [packed.prompts_at_once(n) for n in (1, 4)] == [5, 1] and [packed.bucket(n) for n in (1, 4)] == [2048, 512]
  load = Load(130, 1000, 100).padded(8)
  assert (load.slots, load.pages_per_slot, load.pages(8)) == (136, 18, 136 * 18)
  assert Load(8, 1000, 100, cache_tokens=1000).pages(8) == 16  # as many on each device


def test_memory_by_hand():
  plan, *_ = plan_of()
  experts, others = 48 * 128 * 3 * 2048 * 768, 30.5e9 - 48 * 128 * 3 * 2048 * 768
  assert plan.memory["parameters"] == pytest.approx(2 * (experts / 4 + others), rel=0.02)  # all but experts is whole
  assert plan.token_bytes == 48 * 2 * 4 * 128 * 2
  assert plan.memory["cache"] == 32 * 8192 * plan.token_bytes
  assert plan.fits and plan.available == 95 * GIB and plan.source == "estimate"
  free = plan.available - plan.memory["parameters"] - plan.memory["temporaries"]
  assert plan.room["tokens"] == pytest.approx(4 * free / plan.token_bytes, rel=1e-3)
  assert plan.room["slots"] == 4 * int(plan.room["tokens"] / 4 / 8192)
  half, *_ = plan_of(**{"rollout.max_new_tokens": 3072})
  assert half.memory["cache"] == plan.memory["cache"] / 2


def test_the_teacher_skips_nothing_and_the_student_half():
  static, *_ = plan_of()
  dynamic, *_ = plan_of(dynamic=True)
  assert list(static.programs["decode"].times) == ["0.0"] and list(dynamic.programs["decode"].times) == ["0.0", "0.5"]
  for program in ("prefill", "decode"):
    found = dynamic.programs[program]
    assert found.flops["0.5"]["experts"] == pytest.approx(found.flops["0.0"]["experts"] / 2)
    assert found.times["0.5"].rows == pytest.approx(found.times["0.0"].rows / 2)
    assert found.times["0.5"].step < found.times["0.0"].step
  assert static.programs["decode"].tokens == 128 and static.programs["prefill"].tokens == 4 * 1024
  assert 0 < dynamic.memory["parameters"] - static.memory["parameters"] < 0.01 * static.memory["parameters"]


def test_a_misfit_names_the_slots_that_fit():
  plan, config, again = plan_of(**{"rollout.batch_size": 1024})
  assert not plan.fits
  changes, mended = fewer_slots(plan, config, again)
  assert mended.fits and 350 < changes["rollout.batch_size"] < 500
  assert mended.slots == changes["rollout.batch_size"] and mended.slots % 4 == 0
  hopeless, config, again = plan_of("v5e:2x2")
  assert not hopeless.fits and fewer_slots(hopeless, config, again) is None


def test_rows_beyond_the_context():
  with pytest.raises(ZedaError, match=r"41984 tokens exceed.*40960: lower config.rollout.max_new_tokens"):
    plan_of(**{"rollout.max_new_tokens": 40960})


def test_a_crash_of_the_compiler_leaves_the_estimate(monkeypatch):
  def crash(job, devices):
    assert job.stage == "rollout" and job.program in ("prefill", "decode")
    raise CompilerCrash("signal 6")

  monkeypatch.setattr("zeda_jax.plan.engine.compile_apart", crash)
  plan, config, again = plan_of()
  found = again(config, True)
  assert found.source == "estimate" and "crashed on this plan (signal 6)" in found.note
  assert (found.memory, found.programs) == (plan.memory, plan.programs)


def test_the_command(capsys, monkeypatch):
  monkeypatch.chdir(REPOSITORY)
  flags = ["plan", "--config=configs/glm_4_7_flash.py", "--topology=v6e:2x4", "--stage=rollout", "--estimate"]
  flags += ["--config.rollout.max_new_tokens=7168"]
  assert cli.main([*flags, "--dynamic", "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["kind"] == "dynamic" and found["fits"] and set(found["programs"]) == {"prefill", "decode"}
  assert found["programs"]["decode"]["times"]["0.5"]["step"] > 0
  assert cli.main([*flags, "--config.rollout.batch_size=4096"]) == 0
  text = " ".join(capsys.readouterr().out.split())
  assert "DOES NOT FIT: needs" in text and "fits with --config.rollout.batch_size=" in text and "prefill: 8" in text
