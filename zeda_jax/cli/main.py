"""`zeda COMMAND`: dispatch, help that fits a screen, and errors as one sentence."""

import importlib
import os
import sys

from zeda_jax.errors import ZedaError

# command -> (module, what it does)
COMMANDS = {
  "demo": ("demo", "adapt the embedded tiny teacher, beside its baselines (minutes on a laptop)"),
  "adapt": ("adapt", "inject, rollout, SFT, OPD, export, evaluate: half of the expert work gone"),
  "rollout": ("adapt", "adapt, up to the teacher's rollouts"),
  "sft": ("adapt", "adapt, up to supervised distillation"),
  "opd": ("adapt", "adapt, up to on-policy distillation"),
  "export": ("adapt", "adapt, up to the exported Hugging Face directory"),
  "plan": ("plan", "whether a stage fits a TPU slice, and about how fast it can be"),
  "inject": ("inject", "add zero experts to a Hugging Face directory, untrained"),
  "generate": ("generate", "answer prompts with a static or dynamic checkpoint"),
  "bench": ("bench", "speed of the grouped matmul and of the MoE layer on this machine"),
}

_USAGE = """zeda: post-trained mixture-of-experts models that skip half of their expert work

usage: zeda COMMAND [options]        zeda COMMAND --help

{commands}

adapt, rollout, sft, opd and export are one recipe, stopped at different points: give them the same
--config=FILE and --config.name=value. What is finished is not done again.
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
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nobody reads; the interpreter flushes it at exit
    return 0
  except KeyboardInterrupt:
    print(f"zeda {args[0]}: interrupted; run the same command again to go on from what is saved.", file=sys.stderr)
    return 130
  except OSError as error:
    place = f"{error.filename}: " if error.filename else ""
    print(f"zeda {args[0]}: {place}{error.strerror or error}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
