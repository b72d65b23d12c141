"""`zeda compare`: the recipe beside baselines, in one table."""

from zeda_jax.cli.adapt import run_recipe
from zeda_jax.cli.config_flags import parse_config, take_process_flags

_HELP = """zeda compare: the recipe's result and baselines on the same teacher, rollouts and prompts

usage: zeda compare --config=configs/tiny.py --config.teacher=DIR --config.prompts=FILE.jsonl \\
         --config.workdir=DIR [--variants=NAME,NAME,...] [--config.NAME=VALUE ...]

  --variants=...           rows beside the teacher, injected, sft and student; all by default.
    no training:  truncated       K/2 picks
                  halved          the best K/2 of K run, weights normalised over K
                  skipping        picks far below the best one dropped, as many as the student skips
    trained:      truncated-sft, truncated-trained   K/2 picks with SFT, with SFT and OPD
                  router          zero experts, only the routers trained
                  adamoe          null experts with AdaMoE's balance loss, survivors renormalised
                  expert-balance  zero experts with the balance loss over single experts
                  copy            picks that give the token's own hidden state instead of nothing
                  renormalized    zero experts, survivors' weights scaled up
  --config...              as for `zeda adapt`, whose workdir may be given to go on from it

Every trained variant costs as much as the recipe's own SFT and OPD. The table is in
WORKDIR/summary.md, the training in WORKDIR/variants/. The same command again goes on.
"""


def run(command: str, args: list[str]) -> int:
  if not args or {"-h", "--help"} & set(args):
    print(_HELP)
    return 0
  processes, args = take_process_flags(args)
  names = [arg.split("=", 1)[1] for arg in args if arg.startswith("--variants=")]
  config = parse_config(command, [arg for arg in args if not arg.startswith("--variants=")])

  def recipe(console):
    from zeda_jax.distill.compare import VARIANTS, compare

    chosen = [name for name in names[-1].split(",") if name] if names else tuple(VARIANTS)
    compare(config, chosen, console)

  return run_recipe(command, processes, recipe)
