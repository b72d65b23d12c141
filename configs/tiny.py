"""For a small model of your own on a laptop: short answers, small batches, full-vocabulary losses.

Made for models of up to some tens of millions of parameters, a few hundred prompts or more, and minutes. Such models
bear (and need) learning rates far above those of configs/qwen3_30b_a3b.py. Prompt and answer together must fit
`sft.row_length`; what is longer is cut.
"""

from zeda_jax.distill.recipe import default_config


def get_config():
  config = default_config()
  config.remat = "none"
  config.rollout.update(max_new_tokens=64, batch_size=64, shard_size=256)
  config.sft.update(loss="forward_kl", epochs=3, batch_size=16, row_length=512, save_every=50)
  config.sft.optimizer.update(learning_rate=3e-4)
  config.opd.update(
    loss="reverse_kl", steps=100, prompts_per_step=32, samples_per_prompt=1, max_new_tokens=64, save_every=25
  )
  config.opd.optimizer.update(learning_rate=1e-4)
  config.evaluate.update(num_prompts=64, max_new_tokens=64)
  return config
