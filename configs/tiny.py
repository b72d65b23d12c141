"""A laptop-sized recipe: small batches, short answers, full-vocabulary losses."""

from zeda_jax.distill.recipe import default_config


def get_config():
  config = default_config()
  config.remat = False
  config.rollout.update(max_new_tokens=16, batch_size=256, shard_size=2048)
  return config
