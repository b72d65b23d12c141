"""The whole recipe on the second architecture: `python -m zeda_jax.demo.tiny_glm --workdir DIR`.

Trains a tiny GLM-4.7-Flash (latent attention, sigmoid router with a correction bias, a shared expert, a dense first
layer) on the demo's three task families, adapts it with `zeda adapt`'s own code and prints the table. Exits 1 unless at
least half of the picks of the answers are skipped at a loss of at most 1.5 points.
"""

import argparse
import json
import pathlib

from zeda_jax.config import MLAConfig, ModelConfig
from zeda_jax.data.jsonl import write_jsonl
from zeda_jax.demo import families
from zeda_jax.demo.run import demo_config
from zeda_jax.demo.tokenizer import vocabulary
from zeda_jax.demo.train_teacher import Phase, save_teacher, train
from zeda_jax.distill.adapt import adapt
from zeda_jax.errors import ZedaError

# Minutes, not the three quarters of an hour of the demo's own teacher: math stays far from perfect.
PHASES = (Phase(2400, 1200, 3e-3, {"math": 0.4, "code": 0.3, "instruction": 0.3}),)
TRAIN_EXAMPLES = {"math": 60_000, "code": 30_000, "instruction": 30_000}
CARD = "# A tiny GLM-4.7-Flash\n\nMade by `python -m zeda_jax.demo.tiny_glm`; it knows the demo's tasks alone.\n"
LEAST_SKIPPED, MOST_LOST = 0.5, 1.5  # share of the answers' picks; points


def tiny_glm_config() -> ModelConfig:
  return ModelConfig(
    model_type="glm4_moe_lite",
    vocab_size=-(-len(vocabulary()) // 8) * 8,
    hidden_size=96,
    num_heads=4,
    num_kv_heads=4,
    head_dim=24,
    mla=MLAConfig(kv_lora_rank=32, nope_head_dim=16, rope_head_dim=8, v_head_dim=24, q_lora_rank=48),
    intermediate_size=192,
    moe_intermediate_size=48,
    num_experts=16,
    num_experts_per_tok=4,
    num_shared_experts=1,
    moe_layers=(False, True, True, True),
    scoring="sigmoid",
    routed_scaling_factor=1.8,
    rms_norm_eps=1e-5,
    max_position_embeddings=256,
  )


def run(workdir: str | pathlib.Path, seed: int = 0, held_out: int = 500, train_per_family: int = 2500) -> int:
  """Trains the teacher (unless workdir/teacher is there), adapts it in workdir/main; returns the exit code."""
  workdir = pathlib.Path(workdir)
  teacher, data = workdir / "teacher", workdir / "data"
  if not (teacher / "config.json").is_file():
    save_teacher(train(PHASES, seed=seed, train_examples=TRAIN_EXAMPLES, config=tiny_glm_config()), teacher, CARD)
  config = demo_config(workdir / "main", seed)
  config.update(teacher=str(teacher), prompts=str(data / "train.jsonl"), scan_unroll=3)
  # A sigmoid's slope is gentler than a softmax's: zero experts are learnt more slowly, over more data, and aimed for
  # higher.
  config.sft.weight = config.opd.weight = 2.5
  config.sft.epochs, config.sft.optimizer.learning_rate = 3, 3e-4
  config.evaluate.update(
    prompts=str(data / "held-out.jsonl"),
    num_prompts=3 * held_out,
    models=("teacher", "injected", "sft", "student"),
  )
  data.mkdir(parents=True, exist_ok=True)
  if not (data / "train.jsonl").is_file():
    write_jsonl(data / "train.jsonl", families.mixed_tasks("train", train_per_family))
    write_jsonl(data / "held-out.jsonl", families.mixed_tasks("held_out", held_out))
  adapt(config)
  rows = {name: json.loads((workdir / "main/evaluate" / f"{name}.json").read_text()) for name in ("teacher", "student")}
  lost = 100 * (rows["teacher"]["average"] - rows["student"]["average"])
  skipped = rows["student"]["skipped_response"]
  print(f"lost {lost:.2f} points (at most {MOST_LOST}), skipped {skipped:.3f} of the picks (at least {LEAST_SKIPPED})")
  return 0 if lost <= MOST_LOST and skipped >= LEAST_SKIPPED else 1


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="everything is written below it; run again, it goes on")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  try:
    return run(args.workdir, args.seed)
  except ZedaError as error:
    raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
  raise SystemExit(main())
