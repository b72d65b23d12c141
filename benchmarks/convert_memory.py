"""Time and peak memory of the streaming conversions on a synthetic checkpoint, beside `cp -r` of the same bytes.

  python benchmarks/convert_memory.py --gigabytes 6 --directory /tmp

Each conversion runs in a process of its own; its peak is what `/usr/bin/time -v` calls the maximum resident set size.
"""

import argparse
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from zeda_jax.checkpoint import directory, names
from zeda_jax.checkpoint.safetensors_io import DTYPES, PlannedTensor, TensorSpec, open_weights
from zeda_jax.config import ModelConfig, from_hf, to_hf
from zeda_jax.plan.models import MODELS

CONVERTER = "import sys; from zeda_jax.checkpoint import transform; getattr(transform, sys.argv[1])(*sys.argv[2:])"
# A child starts with the memory of its parent on its account, so a small process starts it, as /usr/bin/time does.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:]), 0)
print(time.perf_counter() - start, usage.ru_maxrss)
sys.exit(status != 0)
"""


def synthetic_config(gigabytes: float) -> ModelConfig:
  """Qwen3-30B-A3B's shapes with as many layers as fill `gigabytes` (decimal) of bfloat16."""

  def config(layers: int) -> ModelConfig:
    return from_hf(MODELS["qwen3_30b_a3b"] | {"num_hidden_layers": layers})

  layers = 1
  while num_bytes(config(layers)) < gigabytes * 1e9:
    layers += 1
  return config(layers)


def num_bytes(config: ModelConfig) -> int:
  return 2 * sum(int(np.prod(tensor.shape)) for tensor in names.hf_tensors(config).values())


def write_synthetic(config: ModelConfig, path: pathlib.Path, max_shard_bytes: int) -> None:
  noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(DTYPES["BF16"])

  def planned(tensor: names.HfTensor) -> PlannedTensor:
    spec = TensorSpec(tensor.name, "BF16", tensor.shape)
    return PlannedTensor(spec, lambda: np.resize(noise, tensor.shape))

  plan = [planned(tensor) for tensor in names.hf_tensors(config).values()]
  directory.write_model(path, plan, to_hf(config), max_shard_bytes=max_shard_bytes)


def measure(command: Sequence[str]) -> tuple[float, float]:
  """Runs a command; returns (seconds, peak resident megabytes)."""
  os.sync()  # so that no run pays for the writes of the one before
  done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], stdout=subprocess.PIPE, text=True)
  if done.returncode != 0:
    raise SystemExit(f"{' '.join(command)} failed")
  seconds, kibibytes = done.stdout.split()[-2:]
  return float(seconds), int(kibibytes) * 1024 / 1e6


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gigabytes", type=float, default=6.0)
  parser.add_argument("--shard-gigabytes", type=float, default=2.0)
  parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
  parser.add_argument("--rounds", type=int, default=3, help="the fastest of this many runs is shown")
  args = parser.parse_args()
  config = synthetic_config(args.gigabytes)
  with tempfile.TemporaryDirectory(dir=args.directory, prefix="convert-memory-") as scratch:
    root = pathlib.Path(scratch)
    write_synthetic(config, root / "static", int(args.shard_gigabytes * 1e9))
    stored = open_weights(root / "static")
    layer = sum(tensor.nbytes for tensor in stored.values() if tensor.name.startswith("model.layers.0."))
    shard = max(file.stat().st_size for file in (root / "static").glob("*.safetensors"))
    shards = len({tensor.file for tensor in stored.values()})
    split = sum(len({t.file for t in stored.values() if f".{i}.mlp.experts" in t.name}) > 1 for i in range(64))
    print(
      f"{num_bytes(config) / 1e9:.2f} GB in {shards} shards, {config.num_layers} layers; "
      f"largest shard {shard / 1e6:.0f} MB, layer {layer / 1e6:.0f} MB; layers split over shards: {split}"
    )
    print(f"{'':<42}{'seconds':>9}{'x cp':>7}{'peak RSS MB':>13}")
    compare(root / "static", root / "dynamic", "inject_directory", args.rounds)
    shutil.rmtree(root / "static")  # leaves the page cache to the other source
    compare(root / "dynamic", root / "plain", "to_plain_directory", args.rounds)


def compare(source: pathlib.Path, target: pathlib.Path, conversion: str, rounds: int) -> None:
  """Prints the rows of one conversion; `target` stays."""
  copy = ["cp", "-r", str(source), str(target)]
  rows = {
    f"cp -r {source.name}": copy,
    f"cp -r {source.name}, synced to disk": ["sh", "-c", f"{shlex.join(copy)} && sync -f {shlex.quote(str(target))}"],
    f"{conversion}, synced to disk": [sys.executable, "-c", CONVERTER, conversion, str(source), str(target)],
  }
  runs: dict[str, list[tuple[float, float]]] = {label: [] for label in rows}
  for _ in range(rounds):  # in turn, so that a slow minute of the machine does not hit one row alone
    for label, command in rows.items():
      shutil.rmtree(target, ignore_errors=True)
      runs[label].append(measure(command))
  baseline = min(seconds for seconds, _ in next(iter(runs.values())))
  for label, measured in runs.items():
    seconds, peak = min(run[0] for run in measured), max(run[1] for run in measured)
    print(f"{label:<42}{seconds:>9.2f}{seconds / baseline:>7.2f}{peak:>13.0f}", flush=True)


if __name__ == "__main__":
  main()
