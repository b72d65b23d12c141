"""`zeda plan`: whether a stage fits a TPU slice, and how fast it can be, before it is rented."""

import argparse
import os

from zeda_jax.cli.config_flags import parse_config
from zeda_jax.errors import ZedaError

_EPILOG = """settings are those of `zeda adapt`, as --config.NAME=VALUE; for example
  --config.sft.row_length=8192 --config.sft.batch_size=256 --config.sft.accumulate=2
  --config.mesh.expert=16 --config.remat=layer --config.sft.trainable=router
teacher, prompts and workdir may be left out. With the TPU compiler (extra tpu-aot) the real
programs are compiled, which takes a minute or two; without it, or where it crashes, the numbers
are estimated from shapes, and say so."""


def run(command: str, args: list[str]) -> int:
  parser = _parser(command)
  flags, rest = parser.parse_known_args(args)
  if not args:
    parser.print_help()
    return 0
  if flags.dynamic and flags.stage != "rollout":
    raise ZedaError("--dynamic is about --stage=rollout; the other stages hold both models anyway.")
  if flags.topology is None:
    raise ZedaError("--topology is missing; give a slice such as --topology=v5p:4x4x4.")
  from zeda_jax.plan import aot

  compiling = not flags.estimate and aot.find_libtpu()
  if compiling:  # before JAX is imported: this process is to compile for a TPU, not to look for one
    os.environ.update(aot.ENVIRONMENT)
  config = parse_config(command, rest)
  from zeda_jax.plan.chips import parse_topology
  from zeda_jax.plan.models import find_model

  topology = parse_topology(flags.topology)
  file = next(a for a in reversed(rest) if a.startswith("--config=")).split("=", 1)[1]
  name, model = find_model(flags.model, config.teacher, file)

  from zeda_jax.distill.recipe import check_config
  from zeda_jax.plan.plan import changed

  missing = {key: "-" for key in ("teacher", "prompts", "workdir") if not config[key]}
  config = changed(config, missing)
  check_config(config)
  if flags.stage == "rollout":
    return _engine(flags, config, name, model, topology, compiling)
  return _training(flags, config, name, model, topology, compiling)


def _training(flags, config, name, model, topology, compiling):
  from zeda_jax.plan import report
  from zeda_jax.plan.plan import faster_mesh, make_plan, suggestions

  def plan(config, compiling):
    return make_plan(config, name, model, topology, flags.stage, flags.prompt_tokens, compiling)

  found = plan(config, compiling)
  suggestion = None if found.fits else suggestions(found, config, model, plan)
  if flags.json:
    print(report.dumps(report.as_json(found, suggestion)))
    return 0
  console = _console(flags, found, compiling)
  report.show(found, console)
  report.show_faster(faster_mesh(config, found, plan) if found.fits else None, console)
  if not found.fits:
    report.show_suggestion(suggestion, console)
  return 0


def _engine(flags, config, name, model, topology, compiling):
  from zeda_jax.plan import report
  from zeda_jax.plan.engine import fewer_slots, make_engine_plan

  def plan(config, compiling):
    return make_engine_plan(config, name, model, topology, flags.prompt_tokens, compiling, flags.dynamic)

  found = plan(config, compiling)
  suggestion = None if found.fits else fewer_slots(found, config, plan)
  if flags.json:
    print(report.dumps(report.engine_as_json(found, suggestion)))
    return 0
  console = _console(flags, found, compiling)
  report.show_engine(found, console)
  if not found.fits:
    report.show_fewer_slots(suggestion, console)
  return 0


def _console(flags, found, compiling):
  """For the tables, after what must be said before them."""
  import rich.console

  console = rich.console.Console()
  if not compiling and not flags.estimate:
    console.print("libtpu is not installed: this is an estimate from shapes (pip install 'zeda-jax\\[tpu-aot]').")
  if found.note:
    console.print(found.note, highlight=False, markup=False, soft_wrap=True)
  return console


def _parser(command: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"zeda {command}",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=_EPILOG,
    usage=f"zeda {command} --config=FILE --topology=v5p:4x4x4 [--stage=sft] [--config.NAME=VALUE ...]",
    allow_abbrev=False,
  )
  parser.add_argument("--topology", help="TPU slice, such as v5p:4x4x4, v6e:8x8, v5e:16x16")
  parser.add_argument("--stage", choices=("sft", "opd", "rollout"), default="sft", help="default: %(default)s")
  parser.add_argument("--model", help="shapes of qwen3_30b_a3b or glm_4_7_flash; by default the config file's own")
  parser.add_argument("--prompt-tokens", type=int, default=1024, help="of the longest prompt, for opd and rollout")
  parser.add_argument("--dynamic", action="store_true", help="rollout: by the adapted model, not by its teacher")
  parser.add_argument("--estimate", action="store_true", help="from shapes alone, though the TPU compiler is there")
  parser.add_argument("--json", action="store_true", help="all numbers, as JSON")
  return parser
