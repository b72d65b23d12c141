"""Generation: sampling, prefill and decode with a key/value cache, and the rollout stage."""
