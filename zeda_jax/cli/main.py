"""`zeda COMMAND`: dispatch, help that fits a screen, and errors as one sentence."""

import importlib
import os
import sys
import traceback
from typing import Any

from zeda_jax.errors import ZedaError

_NEWS_SECONDS = 15.0  # within which it is known whether another process or its host is gone

# command -> (module, what it does)
COMMANDS = {
  "demo": ("demo", "adapt the embedded tiny teacher, beside its baselines (minutes on a laptop)"),
  "adapt": ("adapt", "inject, rollout, SFT, OPD, export, evaluate: half of the expert work gone"),
  "rollout": ("adapt", "adapt, up to the teacher's rollouts"),
  "sft": ("adapt", "adapt, up to supervised distillation"),
  "opd": ("adapt", "adapt, up to on-policy distillation"),
  "export": ("adapt", "adapt, up to the exported Hugging Face directory"),
  "compare": ("compare", "adapt, and baselines beside it in one table: AdaMoE, truncation, ..."),
  "plan": ("plan", "whether a stage fits a TPU slice, and about how fast it can be"),
  "report": ("report", "a page on an adapted model: what it skips, where, at what price"),
  "inject": ("inject", "add zero experts to a Hugging Face directory, untrained"),
  "generate": ("generate", "answer prompts with a static or dynamic checkpoint"),
  "serve": ("serve", "an OpenAI-compatible HTTP server for a static or dynamic checkpoint"),
  "evaluate": ("evaluate", "scores on benchmarks by the paper's protocol; two models compared"),
  "bench": ("bench", "speed of the grouped matmul, the MoE layer and whole models here"),
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
    status, message = module.run(args[0], args[1:]), ""
  except ZedaError as error:
    status, message = 2, str(error)
  except BrokenPipeError:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nobody reads; the interpreter flushes it at exit
    status, message = 0, ""
  except KeyboardInterrupt:
    status, message = 130, "interrupted; run the same command again to go on from what is saved."
  except OSError as error:
    place = f"{error.filename}: " if error.filename else ""
    status, message = 2, f"{place}{error.strerror or error}."
  except Exception as error:
    if not _prefix():
      raise
    # Most likely a collective failed since another process has died; that says more than the traceback.
    _wait_for_news(_NEWS_SECONDS)
    traceback.print_exc()
    status, message = 1, f"{type(error).__name__}: {error}"
  if message:
    _wait_for_news(1.0)
    print(f"zeda {args[0]}: {_prefix()}{message}", file=sys.stderr)
  return _leave(status, message)


# A run of one process never imports the module, and `--help` not even JAX.


def _distributed() -> Any:
  return sys.modules.get("zeda_jax.distributed")


def _prefix() -> str:
  return _distributed().describe_process() if _distributed() else ""


def _wait_for_news(seconds: float) -> None:
  if _distributed():
    _distributed().wait_for_news(seconds)


def _leave(status: int, message: str) -> int:
  if _distributed():
    _distributed().leave(status, message)
  return status


if __name__ == "__main__":
  sys.exit(main())
