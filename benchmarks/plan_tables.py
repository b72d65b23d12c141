"""The tables of docs/plan.md: `zeda plan` of both models, compiled for TPU slices on a machine without a TPU.

  python benchmarks/plan_tables.py --output=plans      # one JSON file a plan; those that are there are kept
  python benchmarks/plan_tables.py --output=plans --table

Each plan is a process of its own, one after the other: the TPU compiler takes no second one. With libtpu they take one
to three minutes each.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
MODELS = ("qwen3_30b_a3b", "glm_4_7_flash")
GIB = 2**30


def _sft(rows: int, length: int, expert: int, *more: str) -> list[str]:
  return [
    f"--config.sft.batch_size={rows}",
    f"--config.sft.row_length={length}",
    f"--config.mesh.expert={expert}",
    *more,
  ]


def _rollout(slots: int, *more: str) -> list[str]:
  sizes = (f"--config.rollout.batch_size={slots}", "--config.rollout.max_new_tokens=7168")
  return ["--stage=rollout", *sizes, *more]


# name -> (slice, flags)
CASES: dict[str, tuple[str, list[str]]] = {
  "v5p": ("v5p:4x4x4", _sft(128, 8192, 4)),
  "v5e": ("v5e:16x16", _sft(256, 8192, 4)),
  "v6e": ("v6e:8x8", _sft(64, 8192, 4)),
  "router": ("v5p:2x2x1", _sft(4, 8192, 4, "--config.sft.trainable=router")),
  "paper": ("v5p:4x4x4", _sft(128, 32768, 4)),
  "opd": (
    "v5p:4x4x4",
    ["--stage=opd", "--config.opd.prompts_per_step=32", "--config.opd.max_new_tokens=7168", "--config.mesh.expert=4"],
  ),
  "rollout-v5p": ("v5p:2x2x1", _rollout(128)),
  "rollout-v5p-dynamic": ("v5p:2x2x1", _rollout(128, "--dynamic")),
  "rollout-v6e": ("v6e:2x4", _rollout(128)),
  "rollout-v6e-dynamic": ("v6e:2x4", _rollout(128, "--dynamic")),
  "rollout": ("v5p:4x4x4", _rollout(512)),
}


def command(model: str, case: str) -> list[str]:
  topology, flags = CASES[case]
  return ["plan", f"--config=configs/{model}.py", f"--topology={topology}", *flags]


def make(output: pathlib.Path, model: str, case: str) -> None:
  file = output / f"{case}-{model}.json"
  if file.is_file():
    return
  arguments = [sys.executable, "-m", "zeda_jax.cli.main", *command(model, case), "--json"]
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  child = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
  if child.returncode:
    print(f"{case} {model}: {child.stderr.strip()[-2000:]}", file=sys.stderr)
    return
  file.write_text(child.stdout)
  print(f"{file}: done", flush=True)


def tables(output: pathlib.Path) -> str:
  """One line for each plan that is there: of training stages, and of the engine."""
  training = [
    "| | slice | mesh | rows × tokens | a chip | needs, GiB | held | gradients | kept | rest | PFLOPs a step "
    "| weights sent, GB | rows sent, GB | step, s | tokens/s/chip | slowest |",
    "|" + "---|" * 16,
  ]
  engine = [
    "| | slice | slots × tokens | needs, GiB | parameters | pages | beside: prefill | decode | room for tokens "
    "| prompts read at once | s | tokens/s/chip | decode step, ms | tokens/s/chip | slowest |",
    "|" + "---|" * 15,
  ]
  for case in CASES:
    for model in MODELS:
      file = output / f"{case}-{model}.json"
      if file.is_file():
        found = json.loads(file.read_text())
        (engine if "programs" in found else training).append(
          _engine_line(found) if "programs" in found else _line(case, found)
        )
  return "\n".join([*training, "", *engine])


def _both(values: Iterable[Any], form: str = "{}") -> str:
  return " / ".join(dict.fromkeys(form.format(v) for v in values))


def _needs(p: dict) -> str:
  return f"{p['needed'] / GIB:.1f} of {p['available'] / GIB:.1f}: {'fits' if p['fits'] else 'does not fit'}"


def _engine_line(p: dict) -> str:
  prefill, decode = p["programs"]["prefill"], p["programs"]["decode"]
  steps = lambda program, factor: [t["step"] * factor for t in program["times"].values()]
  rates = lambda program: _both(program["tokens_per_second_per_chip"].values(), "{:.0f}")
  return " | ".join(
    [
      f"| {p['model']}, {p['kind']}",
      p["topology"],
      f"{p['slots']} × {p['prompt'] + p['new']}",
      _needs(p),
      f"{p['memory']['parameters'] / GIB:.1f}",
      f"{p['memory']['cache'] / GIB:.1f}",
      f"{prefill['temporaries'] / GIB:.2f}",
      f"{decode['temporaries'] / GIB:.2f}",
      f"{p['room']['tokens'] / 1e6:.2f} M",
      f"{p['prompts']} × {p['prompt']}",
      _both(steps(prefill, 1.0), "{:.3f}"),
      rates(prefill),
      _both(steps(decode, 1e3), "{:.1f}"),
      rates(decode),
      _both(t["bound"] for t in (*prefill["times"].values(), *decode["times"].values())) + " |",
    ]
  )


def _line(case: str, p: dict) -> str:
  memory, gib = p["memory"], lambda *kinds: f"{sum(p['memory'].get(k, 0) for k in kinds) / GIB:.1f}"
  moved = {
    rows: sum(s["bytes"] for s in p["traffic"] if ("all-to-all" in s["kind"]) == rows) / 1e9 for rows in (False, True)
  }
  return " | ".join(
    [
      f"| {p['model']}, {p['stage']}{', router only' if case == 'router' else ''}",
      f"{p['topology']}",
      f"{p['mesh']['data']} × {p['mesh']['expert']}",
      f"{p['rows']} × {p['row_length']}",
      f"{p['padded_rows'] // p['devices']}",
      _needs(p),
      gib("parameters", "optimizer", "teacher"),
      gib("gradients"),
      gib("activations"),
      f"{memory['temporaries'] / GIB:.1f}",
      _both((v / 1e15 for v in p["step_flops"].values()), "{:.2f}"),
      f"{moved[False]:.1f}",
      f"{moved[True]:.1f}",
      _both((t["step"] for t in p["times"].values()), "{:.2f}"),
      _both(p["tokens_per_second_per_chip"].values(), "{:.0f}"),
      _both(t["bound"] for t in p["times"].values()) + " |",
    ]
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
  parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
  parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
  parser.add_argument("--table", action="store_true", help="only print the table of what is there")
  flags = parser.parse_args()
  flags.output.mkdir(parents=True, exist_ok=True)
  if not flags.table:
    for case in flags.cases:
      for model in flags.models:
        make(flags.output, model, case)
  print(tables(flags.output))


if __name__ == "__main__":
  main()
