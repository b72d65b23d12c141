"""Compiles one program of a plan, in a process of its own: reads a job as JSON, writes what the compiler says as JSON.

python -m zeda_jax.plan.worker ANSWER < JOB
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

from zeda_jax.errors import ZedaError
from zeda_jax.plan.aot import Compiled, compile_program, describe_devices, find_libtpu


@dataclasses.dataclass(frozen=True)
class Job:
  """One program to compile; everything in it is JSON.

  Attributes:
    config: the recipe's settings, by dotted name.
    model: config.json of the static model.
    topology: of the slice.
    stage: of steps.STAGES.
    prompt_tokens: of the longest prompt, for opd and rollout.
    program: "step", or one of generation.PROGRAMS.
    dynamic: generation by the adapted model.
    quickly: see aot.QUICKLY.
  """

  config: dict[str, Any]
  model: dict[str, Any]
  topology: str
  stage: str
  prompt_tokens: int
  program: str
  dynamic: bool
  quickly: bool


def compile_job(job: Job) -> Compiled:
  """Builds the program from the job and compiles it.

  Raises:
    ZedaError: the compiler knows no such topology, or fails for another reason than memory.
  """
  from zeda_jax.config import from_hf
  from zeda_jax.distill.recipe import default_config
  from zeda_jax.plan import generation, steps

  config = default_config()
  config.update_from_flattened_dict(job.config)
  model = from_hf(job.model)
  sharding = steps.make_sharding(config, model, job.topology, job.stage, describe_devices(job.topology))
  static: dict[str, Any] = {}
  if job.stage == "rollout":
    models = steps.abstract_models(config, model, sharding)
    load = generation.stage_load(config, job.prompt_tokens).padded(sharding.num_devices)
    program = generation.engine_program(job.program, models, load, sharding, job.dynamic)
    function, arguments, static = program
  else:
    batch = steps.stage_batch(config, job.stage, job.prompt_tokens)
    models = steps.abstract_models(config, model, sharding, config[job.stage].trainable)
    function, arguments = steps.train_program(config, job.stage, models, batch, sharding)
  return compile_program(function, arguments, sharding, static, job.quickly)


def main() -> None:
  (answer,) = sys.argv[1:]
  job = Job(**json.load(sys.stdin))
  find_libtpu()
  try:
    found: dict[str, Any] = compile_job(job)._asdict()
  except ZedaError as error:
    found = {"error": str(error)}
  pathlib.Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
  main()
