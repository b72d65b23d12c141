"""GLM-4.7-Flash as in the paper (arXiv 2605.18643, sections 3 and 4): 64 experts, 4 picks, 32 zero experts.

As for Qwen3-30B-A3B but for the number of zero experts and the learning rate of OPD. The correction biases of the
routers are widened with the routers and stay as they are: no gradient reaches them.
"""

from zeda_jax.distill.recipe import default_config


def get_config():
  config = default_config()
  config.student.num_zero_experts = 32
  config.rollout.update(max_new_tokens=32768, temperature=1.0)
  balance = {"balance": "group", "weight": 2.0, "coefficient": 0.1}
  adamw = {"b1": 0.9, "b2": 0.98, "weight_decay": 0.1}

  # A batch is 128 rows, into which whole rollouts are packed.
  config.sft.update(loss="cross_entropy", trainable="all", epochs=1, batch_size=128, row_length=32768, **balance)
  config.sft.optimizer.update(learning_rate=2e-5, schedule="cosine", warmup_fraction=0.1, **adamw)

  config.opd.update(loss="sampled", trainable="all", steps=320, prompts_per_step=16, samples_per_prompt=2, **balance)
  config.opd.update(temperature=1.0, max_new_tokens=32768)
  config.opd.optimizer.update(learning_rate=1e-6, schedule="constant", warmup_fraction=0.0, **adamw)

  config.evaluate.update(temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=38912)
  return config
