"""`zeda adapt` and its single stages."""

import os
from collections.abc import Callable
from typing import Any

from zeda_jax.cli.config_flags import parse_config, take_process_flags

_HELP = """zeda {command}: {what}

usage: zeda {command} --config=configs/tiny.py --config.teacher=DIR --config.prompts=FILE.jsonl \\
         --config.workdir=DIR [--config.NAME=VALUE ...]

  --config=FILE            settings: configs/tiny.py, configs/qwen3_30b_a3b.py or your own
  --config.teacher=DIR     Hugging Face directory of the static model
  --config.prompts=FILE    JSONL (one object a line with prompt or messages, optional label) or
                           array_record
  --config.workdir=DIR     everything is written below it: rollouts/, sft/, opd/, student/ (the
                           result), evaluate/, summary.md; the same command again goes on
  --config.NAME=VALUE      any other setting, for example
    --config.student.num_zero_experts=64 half the experts by default
    --config.sft.weight=3                share of zero picks, w N_Z / (N + w N_Z); opd.weight too
    --config.sft.trainable=router        all | router | router+norms; opd.trainable likewise
    --config.rollout.engine=openai       jax | openai: a server, --config.rollout.url=http://…
    --config.sft.loss=forward_kl         cross_entropy | forward_kl
    --config.opd.loss=reverse_kl         sampled | reverse_kl
    --config.evaluate.num_prompts=256    held out of the prompts, or --config.evaluate.prompts=FILE
    --config.export.plain=True           also student-plain/, for engines without zero experts

zeda_jax/distill/recipe.py lists every setting. SIGTERM and Ctrl-C save and exit 0, or as
ZEDA_EXIT_WHEN_STOPPED says, by which a launcher knows that the command must run again.

Several processes as one run: start this command once for each. Cloud TPU and GKE, srun and Open MPI
say how many there are and where; elsewhere give all of these (or JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES, JAX_PROCESS_ID). If one dies or fails, all stop; status 75: try again.
  --coordinator=HOST:PORT  of process 0, a port that is free there
  --num-processes=N --process-id=I
"""


def run(command: str, args: list[str]) -> int:
  if not args or {"-h", "--help"} & set(args):
    from zeda_jax.cli.main import COMMANDS

    print(_HELP.format(command=command, what=COMMANDS[command][1]))
    return 0
  processes, args = take_process_flags(args)
  config = parse_config(command, args)

  def recipe(console):
    from zeda_jax.distill.adapt import adapt

    adapt(config, console, until="evaluate" if command == "adapt" else command)

  return run_recipe(command, processes, recipe)


def run_recipe(command: str, processes: dict[str, Any], recipe: Callable[..., object]) -> int:
  """Calls recipe(console) as one of several processes, if there are; being stopped after saving is no error."""
  # Imported late: `--help` and a wrong flag should not wait for JAX.
  from zeda_jax import distributed

  distributed.initialize(**processes)
  import rich.console

  from zeda_jax.distill.trainer import StoppedEarly

  primary = distributed.is_primary()
  try:
    recipe(rich.console.Console(quiet=not primary))
  except StoppedEarly as stopped:
    if primary:
      print(f"zeda {command}: {stopped}")
    return int(os.environ.get("ZEDA_EXIT_WHEN_STOPPED", "0"))
  return 0
