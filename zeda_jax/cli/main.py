"""`zeda COMMAND`: dispatch, help that fits a screen, and errors as one sentence."""

import importlib
import sys

from zeda_jax.errors import ZedaError

# command -> (module, what it does)
COMMANDS = {
  "demo": ("demo", "adapt the embedded tiny teacher and print the table of baselines (minutes on a laptop)"),
  "adapt": ("adapt", "inject, rollout, SFT, OPD, export, evaluate: a checkpoint in, its half-skipping twin out"),
  "rollout": ("adapt", "adapt, up to the teacher's rollouts"),
  "sft": ("adapt", "adapt, up to supervised distillation"),
  "opd": ("adapt", "adapt, up to on-policy distillation"),
  "export": ("adapt", "adapt, up to the exported Hugging Face directory"),
  "inject": ("inject", "add zero experts to a Hugging Face directory, untrained"),
  "generate": ("generate", "answer prompts with a static or dynamic checkpoint"),
}

_USAGE = """zeda: post-trained mixture-of-experts models that skip half of their expert work

usage: zeda COMMAND [options]        zeda COMMAND --help

{commands}

The adapt family takes --config=configs/tiny.py (or another file) and --config.name=value for any setting.
"""


def usage() -> str:
  width = max(map(len, COMMANDS))
  return _USAGE.format(commands="\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()))


def main(argv: list[str] | None = None) -> int:
  """Runs one command. Returns the exit status: 0 done or stopped and saved, 2 an error the user can mend."""
  args = sys.argv[1:] if argv is None else argv
  if not args or args[0] in ("-h", "--help", "help"):
    print(usage())
    return 0
  if args[0] not in COMMANDS:
    print(f"zeda: {args[0]!r} is no command; expected one of {', '.join(COMMANDS)}.", file=sys.stderr)
    return 2
  module = importlib.import_module(f"zeda_jax.cli.{COMMANDS[args[0]][0]}")
  try:
    return module.run(args[0], args[1:])
  except ZedaError as error:
    print(f"zeda {args[0]}: {error}", file=sys.stderr)
    return 2
  except BrokenPipeError:
    return 0


if __name__ == "__main__":
  sys.exit(main())
