"""Causal attention in packed rows and its gradients in float64 numpy, with every weight written out."""

import numpy as np


def visible(segments):
  """[T, T]: query t sees key s."""
  index = np.arange(len(segments))
  return (index <= index[:, None]) & (segments == segments[:, None]) & (segments > 0)


def attention(query, key, value, segments, grad, scale):
  """Output and gradients of query, key and value for the gradient `grad` of the output. Padding gives 0."""
  query, key, value, grad = (np.asarray(x, np.float64) for x in (query, key, value, grad))
  out, d_query, d_key, d_value = np.zeros(grad.shape), np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
  shared = query.shape[2] // key.shape[2]
  for b in range(query.shape[0]):
    mask = visible(segments[b])
    for n in range(query.shape[2]):
      q, k, v, g = query[b, :, n], key[b, :, n // shared], value[b, :, n // shared], grad[b, :, n]
      logits = np.where(mask, scale * q @ k.T, -np.inf)
      largest = logits.max(axis=-1, keepdims=True)
      weights = np.exp(logits - np.where(np.isfinite(largest), largest, 0))
      weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
      out[b, :, n] = weights @ v
      d_weights = g @ v.T
      d_logits = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
      d_query[b, :, n] = scale * d_logits @ k
      d_key[b, :, n // shared] += scale * d_logits.T @ q
      d_value[b, :, n // shared] += weights.T @ g
  return out, d_query, d_key, d_value
