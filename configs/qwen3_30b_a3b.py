"""Qwen3-30B-A3B as in the paper (arXiv 2605.18643, sections 3 and 4): 128 experts, 8 picks, 64 zero experts.

The paper's prompts: 60k, of which 17k math, 15k code and 28k chat. `sft.loss=forward_kl` and `opd.loss=reverse_kl` are
the exact, full-vocabulary forms of its losses. For GPUs or TPUs: parameters, gradients and the optimizer's fp32 moments
and master weights take about 16 bytes per parameter, the teacher another 2.
"""

from zeda_jax.distill.recipe import default_config


def get_config():
  config = default_config()
  config.student.num_zero_experts = 64
  config.rollout.update(max_new_tokens=32768, temperature=1.0)
  balance = {"balance": "group", "weight": 2.0, "coefficient": 0.1}
  adamw = {"b1": 0.9, "b2": 0.98, "weight_decay": 0.1}

  # A batch is 128 rows, into which whole rollouts are packed.
  config.sft.update(loss="cross_entropy", trainable="all", epochs=1, batch_size=128, row_length=32768, **balance)
  config.sft.optimizer.update(learning_rate=2e-5, schedule="cosine", warmup_fraction=0.1, **adamw)

  config.opd.update(loss="sampled", trainable="all", steps=320, prompts_per_step=16, samples_per_prompt=2, **balance)
  config.opd.update(temperature=1.0, max_new_tokens=32768)
  config.opd.optimizer.update(learning_rate=5e-6, schedule="constant", warmup_fraction=0.0, **adamw)

  config.evaluate.update(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=38912)
  return config
