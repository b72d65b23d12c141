"""The method against independent numpy: routing, balance losses, ratios, new router rows."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zeda_jax
from zeda_jax.errors import ZedaError
from zeda_jax.zero_experts import (
  adamoe_balance_loss,
  choice_scores,
  expert_balance_loss,
  group_balance_loss,
  new_router_rows,
  route,
  router_scores,
  target_ratio,
  zero_expert_ratio,
)

N, NZ, K, T = 6, 3, 2, 40


def softmax(logits):
  exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return exp / exp.sum(axis=-1, keepdims=True)


def random_scores(seed=0, tokens=T, experts=N + NZ):
  return softmax(np.random.default_rng(seed).standard_normal((tokens, experts))).astype(np.float32)


def best(scores, k=K):
  """Ids of the best k, the smaller id first among equals."""
  return np.argsort(-scores, axis=-1, kind="stable")[:, :k].astype(np.int32)


def plain_group_loss(scores, picks, n, w, alpha, mask):
  """Token by token, as the paper's formula reads."""
  nz, k, tokens = scores.shape[1] - n, picks.shape[1], int(mask.sum())
  f_e = f_z = p_e = p_z = 0.0
  for t in np.flatnonzero(mask):
    for pick in picks[t]:
      f_e, f_z = f_e + (pick < n), f_z + (pick >= n)
    p_e, p_z = p_e + float(scores[t, :n].astype(float).sum()), p_z + float(scores[t, n:].astype(float).sum())
  f_e, f_z, p_e, p_z = (value / tokens for value in (f_e, f_z, p_e, p_z))
  assert np.isclose(f_e + f_z, k)
  return alpha * (n + w * nz) / k * (f_e * p_e / n + f_z * p_z / (w * nz))


# --- group balance loss -------------------------------------------------------------------------------------------

jitted_group_loss = jax.jit(group_balance_loss, static_argnums=2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("w", "alpha"), [(1.0, 0.1), (2.0, 0.1), (3.5, 1.0)])
def test_group_loss_equals_numpy(seed, w, alpha):
  scores = random_scores(seed)
  picks = best(scores)
  mask = np.random.default_rng(seed).random(T) < 0.7
  for m, given in ((np.ones(T, bool), None), (mask, mask), (mask, mask.astype(np.float32))):
    expected = plain_group_loss(scores, picks, N, w, alpha, m)
    found = jitted_group_loss(scores, picks, N, w, alpha, given)
    assert found.shape == ()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_group_loss_has_the_documented_defaults():
  scores = random_scores()
  expected = plain_group_loss(scores, best(scores), N, 2.0, 0.1, np.ones(T, bool))
  found = zeda_jax.group_balance_loss(scores, best(scores), num_experts=N)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("n", "nz", "w"), [(6, 3, 2.0), (4, 4, 1.0), (4, 2, 6.0)])
def test_group_loss_is_the_coefficient_at_the_target(n, nz, w):
  ratio = target_ratio(n, nz, w)
  assert ratio == pytest.approx(w * nz / (n + w * nz))
  slots = np.arange(40) % 20 < round(20 * ratio)  # share of zero picks: exactly the target for these numbers
  assert slots.mean() == pytest.approx(ratio)
  picks = np.where(slots, n, 0).reshape(20, 2)
  for mass in (ratio, 0.2, 0.9):  # any P: at the target both groups' terms have the same weight
    scores = np.concatenate([np.full((20, n), (1 - mass) / n), np.full((20, nz), mass / nz)], axis=1)
    found = group_balance_loss(jnp.asarray(scores, jnp.float32), picks, n, w, 0.37)
    np.testing.assert_allclose(found, 0.37, atol=1e-6)


def test_the_loss_pulls_towards_the_target():
  """Too few zero picks: more mass on the zero group lowers the loss; too many: it raises it."""
  scores = random_scores()
  slope = lambda picks: jax.grad(lambda s: group_balance_loss(s, picks, N, 2.0))(scores)[:, N:].mean()
  other = lambda picks: jax.grad(lambda s: group_balance_loss(s, picks, N, 2.0))(scores)[:, :N].mean()
  few, many = np.zeros((T, K), np.int32), np.full((T, K), N, np.int32)
  assert slope(few) < other(few)
  assert slope(many) > other(many)


def test_gradient_flows_through_the_scores_only():
  scores = random_scores()
  picks = best(scores)
  mask = np.arange(T) % 3 > 0
  found = jax.grad(group_balance_loss)(scores, picks, N, 2.0, 0.1, mask)
  f_z = (picks[mask] >= N).sum() / mask.sum()
  scale = 0.1 * (N + 2.0 * NZ) / K / mask.sum()
  expected = np.zeros(scores.shape)
  expected[mask, :N] = scale * (K - f_z) / N
  expected[mask, N:] = scale * f_z / (2.0 * NZ)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)
  # The same through the routing that made the picks: counting has no gradient.
  logits = np.log(scores)

  def through_routing(logits):
    routing = route(router_scores(logits[:, :N], logits[:, N:]), K, N)
    return group_balance_loss(routing.scores, routing.picks, N, 2.0, 0.1, mask)

  chained = scores * (expected - (scores * expected).sum(axis=1, keepdims=True))
  np.testing.assert_allclose(jax.grad(through_routing)(logits), chained, rtol=1e-4, atol=1e-8)


LOSSES = {
  "group": lambda scores, picks, mask: group_balance_loss(scores, picks, N, mask=mask),
  "expert": lambda scores, picks, mask: expert_balance_loss(scores, picks, mask=mask),
  "adamoe": lambda scores, picks, mask: adamoe_balance_loss(scores, picks, N, mask=mask),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("garbage", [0.0, 1e9, np.nan, np.inf])
def test_padding_changes_nothing(loss, garbage):
  scores = random_scores()
  picks = best(scores)
  mask = np.ones(T + 11, bool)
  where = np.random.default_rng(0).choice(T + 11, 11, replace=False)
  mask[where] = False
  padded, padded_picks = np.full((T + 11, N + NZ), garbage, np.float32), np.full((T + 11, K), N + 1, np.int32)
  padded[mask], padded_picks[mask] = scores, picks
  value, slope = jax.value_and_grad(loss)(scores, picks, None)
  found, found_slope = jax.value_and_grad(loss)(padded, padded_picks, mask)
  np.testing.assert_allclose(found, value, rtol=1e-6)
  np.testing.assert_allclose(found_slope[mask], slope, rtol=1e-6)
  np.testing.assert_array_equal(found_slope[~mask], 0)


def test_nothing_but_padding_costs_nothing():
  scores = random_scores()
  nothing = np.zeros(T, bool)
  value, slope = jax.value_and_grad(group_balance_loss)(scores, best(scores), N, 2.0, 0.1, nothing)
  assert value == 0
  np.testing.assert_array_equal(slope, 0)
  assert expert_balance_loss(scores, best(scores), mask=nothing) == 0


def test_expert_loss_equals_numpy():
  scores = random_scores()
  picks = best(scores)
  mask = np.arange(T) % 4 > 0
  counts = np.array([(picks[mask] == e).sum() for e in range(N + NZ)]) / mask.sum()
  expected = 0.3 * (N + NZ) / K * (counts * scores[mask].astype(float).mean(axis=0)).sum()
  np.testing.assert_allclose(expert_balance_loss(scores, picks, 0.3, mask), expected, rtol=0, atol=1e-6)
  slope = jax.grad(expert_balance_loss)(scores, picks, 0.3, mask)
  np.testing.assert_allclose(slope[1], 0.3 * (N + NZ) / K * counts / mask.sum(), rtol=1e-5)
  # Equal load: the coefficient.
  even = np.full((N + NZ, N + NZ), 1 / (N + NZ), np.float32)
  picks = np.stack([np.arange(N + NZ), np.roll(np.arange(N + NZ), 1)], axis=1)
  np.testing.assert_allclose(expert_balance_loss(even, picks, 0.3), 0.3, rtol=1e-6)


def test_adamoe_loss_shares_the_load_of_zero_experts():
  scores = random_scores()
  picks = best(scores)
  mask = np.arange(T) % 4 > 0
  loads = [(picks[mask] == e).sum() / mask.sum() for e in range(N)]
  loads += [(picks[mask] >= N).sum() / mask.sum() / NZ] * NZ
  expected = sum(load * scores[mask, e].astype(float).mean() for e, load in enumerate(loads))
  expected *= 0.3 * (N + NZ) / K
  np.testing.assert_allclose(adamoe_balance_loss(scores, picks, N, 0.3, mask), expected, rtol=1e-5)
  # Which of the zero experts is picked does not matter, as it does for L_A.
  moved = np.where(picks >= N, N, picks)
  np.testing.assert_allclose(adamoe_balance_loss(scores, moved, N, 0.3, mask), expected, rtol=1e-5)
  assert abs(expert_balance_loss(scores, moved, 0.3, mask) - expert_balance_loss(scores, picks, 0.3, mask)) > 1e-3


# --- routing ------------------------------------------------------------------------------------------------------


def plain_route(scores, k, normalize, execute, beta):
  """One token after another."""
  picks, weights = np.full((len(scores), k), scores.shape[1]), np.zeros((len(scores), k))
  for t, row in enumerate(scores.astype(np.float64)):
    chosen = [int(e) for e in best(row[None], k)[0]]
    kept = [e for e in chosen if row[e] >= beta * row[chosen[0]]] if beta else chosen
    total = sum(row[e] for e in kept) if normalize else 1.0
    for slot, expert in enumerate(kept[:execute]):
      picks[t, slot], weights[t, slot] = expert, row[expert] / total
  return picks, weights


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("execute", "beta"), [(None, 0.0), (2, 0.0), (1, 0.0), (None, 0.5), (None, 1.0), (2, 0.3)])
def test_routing_equals_numpy(normalize, execute, beta):
  scores = random_scores(tokens=200)
  expected_picks, expected_weights = plain_route(scores, 4, normalize, execute, np.float32(beta))
  found = route(jnp.asarray(scores), 4, N, normalize=normalize, execute_top_k=execute, skip_threshold=beta)
  np.testing.assert_array_equal(found.picks, expected_picks)
  np.testing.assert_allclose(found.weights, expected_weights, rtol=1e-5)
  np.testing.assert_array_equal(found.scores, scores)
  assert found.picks.dtype == jnp.int32
  if beta in (0.5, 1.0) or execute == 1:
    assert (expected_picks == N + NZ).any()  # something was dropped


@pytest.mark.parametrize("normalize", [True, False])
def test_renormalised_survivors_have_the_weight_of_all(normalize):
  scores = np.concatenate([random_scores(tokens=200), np.full((1, N + NZ), 0.05, np.float32)])
  scores[-1, N:] = 0.2  # no survivor among the best three
  plain = route(jnp.asarray(scores), 3, N, normalize=normalize)
  found = route(jnp.asarray(scores), 3, N, normalize=normalize, renormalize=True)
  np.testing.assert_array_equal(found.picks, plain.picks)
  normal = np.asarray(plain.picks) < N
  weights = np.where(normal, plain.weights, 0.0)
  total, left = np.asarray(plain.weights).sum(axis=1, keepdims=True), weights.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(np.where(normal, found.weights, 0.0), weights * total / np.maximum(left, 1e-9), rtol=1e-5)
  assert normal.all(axis=1).any() and (~normal).all(axis=1).any()

  def weights_of(scores):
    return (route(scores, 3, N, normalize=normalize, renormalize=True).weights ** 2).sum()

  assert np.isfinite(jax.grad(weights_of)(jnp.asarray(scores))).all()


def sigmoid(x):
  return (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)


def plain_sigmoid_route(scores, n, k, correction, groups, top_groups, normalize, scaling, execute, beta):
  """One token after another: groups first, then the best of score + correction, weights of the scores alone."""
  picks, weights = np.full((len(scores), k), scores.shape[1]), np.zeros((len(scores), k))
  for t, row in enumerate(scores):
    choice = row + correction
    sums = [np.sort(part)[-2:].sum() for part in np.split(choice[:n], groups)]
    allowed = sorted(range(groups), key=lambda g: -sums[g])[:top_groups]
    open_to = [e for e in range(len(row)) if e >= n or e // (n // groups) in allowed]
    chosen = sorted(open_to, key=lambda e: -choice[e])[:k]
    most = max(row[e] for e in chosen)
    kept = [e for e in chosen if row[e] >= beta * most]
    total = sum(float(row[e]) for e in kept) if normalize else 1.0
    for slot, expert in enumerate(chosen):
      if expert in kept and (execute is None or slot < execute):
        picks[t, slot], weights[t, slot] = expert, scaling * row[expert] / total
  return picks, weights


@pytest.mark.parametrize("zero", [0, 5])
@pytest.mark.parametrize(
  ("groups", "top_groups", "normalize", "scaling", "execute", "beta"),
  [
    (1, 1, True, 1.8, None, 0.0),
    (1, 1, False, 1.0, 2, 0.0),
    (4, 2, True, 1.8, None, 0.0),
    (4, 2, True, 1.8, 2, 0.0),
    (2, 1, True, 1.8, None, np.float32(0.7)),
    (3, 3, False, 0.5, None, 0.0),
  ],
)
def test_sigmoid_routing_equals_numpy(zero, groups, top_groups, normalize, scaling, execute, beta):
  n, k = 12, 4
  rng = np.random.default_rng(0)
  logits = rng.standard_normal((200, n + zero)).astype(np.float32)
  correction = (0.3 * rng.standard_normal(n + zero)).astype(np.float32)
  scores = router_scores(logits[:, :n], logits[:, n:] if zero else None, scoring="sigmoid")
  np.testing.assert_allclose(scores, sigmoid(logits), rtol=1e-5)
  found = route(
    scores,
    k,
    n,
    correction=jnp.asarray(correction),
    num_groups=groups,
    top_groups=top_groups,
    normalize=normalize,
    scaling=scaling,
    execute_top_k=execute,
    skip_threshold=float(beta),
  )
  plain = plain_sigmoid_route(
    np.asarray(scores), n, k, correction, groups, top_groups, normalize, scaling, execute, beta
  )
  np.testing.assert_array_equal(found.picks, plain[0])
  np.testing.assert_allclose(found.weights, plain[1], rtol=1e-5)
  assert (best(np.asarray(scores), k) != found.picks).any()  # the bias changes the choice
  if zero:
    assert ((plain[0] >= n) & (plain[0] < n + zero)).any()  # zero experts compete, whatever the groups


def test_a_masked_zero_expert_is_not_brought_back_by_its_bias():
  logits, zero = np.full((1, 4), -80.0, np.float32), np.full((1, 2), 5.0, np.float32)
  correction = jnp.array([-1.0, -1.0, -1.0, -1.0, 9.0, 9.0])
  masked = router_scores(logits, zero, -jnp.inf, scoring="sigmoid")
  np.testing.assert_array_equal(masked[:, :4], router_scores(logits, None, scoring="sigmoid"))
  np.testing.assert_array_equal(choice_scores(masked, 4, correction)[0, 4:], -np.inf)
  np.testing.assert_array_equal(route(masked, 2, 4, correction=correction).picks, [[0, 1]])
  unmasked = router_scores(logits, zero, scoring="sigmoid")
  np.testing.assert_array_equal(route(unmasked, 2, 4, correction=correction).picks, [[4, 5]])


def test_no_gradient_reaches_the_correction_bias_and_the_weights_have_theirs():
  rng = np.random.default_rng(0)
  logits, correction = rng.standard_normal((20, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
  weight = rng.standard_normal((20, 3)).astype(np.float32)

  def total(logits, correction):
    scores = router_scores(logits[:, :6], logits[:, 6:], scoring="sigmoid")
    return (route(scores, 3, 6, correction=correction, scaling=1.8).weights * weight).sum()

  on_logits, on_correction = jax.grad(total, argnums=(0, 1))(logits, correction)
  np.testing.assert_array_equal(on_correction, 0)
  picks = route(router_scores(logits[:, :6], logits[:, 6:], scoring="sigmoid"), 3, 6, correction=correction).picks

  def by_hand(logits):  # the picks as constants
    picked = jnp.take_along_axis(jax.nn.sigmoid(logits), picks, axis=1)
    return (1.8 * picked / picked.sum(axis=1, keepdims=True) * weight).sum()

  np.testing.assert_allclose(on_logits, jax.grad(by_hand)(logits), rtol=1e-4, atol=1e-6)


jitted_route = jax.jit(lambda a, b, bias: route(router_scores(a, b, bias), 3, 5))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  seed=st.integers(0, 2**32 - 1),
  scale=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1000.0]),
  bias=st.sampled_from([-np.inf, -5.0, 0.0, 5.0, 1e4]),
)
def test_any_routing(seed, scale, bias):
  rng = np.random.default_rng(seed)
  logits, zero = (scale * rng.standard_normal((8, n)).astype(np.float32) for n in (5, 4))
  scores, picks, weights = (np.asarray(a) for a in jitted_route(logits, zero, bias)[:3])
  np.testing.assert_allclose(scores, softmax(np.concatenate([logits, zero + np.float32(bias)], axis=1)), atol=1e-6)
  assert ((picks >= 0) & (picks < 9)).all()
  assert all(len(set(row)) == 3 for row in picks)
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)  # over all picks, zero ones included
  assert (np.diff(weights, axis=1) <= 0).all()
  picked = np.take_along_axis(scores, picks, axis=1)
  np.testing.assert_allclose(weights, picked / picked.sum(axis=1, keepdims=True), rtol=1e-5)
  np.testing.assert_array_equal(picked, -np.sort(-scores, axis=1)[:, :3])
  if bias == -np.inf:
    assert (picks < 5).all()
    np.testing.assert_array_equal(scores[:, 5:], 0)
  if bias == 1e4:
    np.testing.assert_array_equal(weights[picks < 5], 0)
  if bias == 1e4 and scale <= 1:  # beyond, zero experts underflow to a score of 0 and tie with the normal ones
    assert (picks >= 5).all()


def test_a_zero_logit_of_minus_infinity_is_never_picked():
  logits = np.array([[0.0, -3e38, -np.inf, 1.0]], np.float32)  # underflow to exactly 0 among the normal experts
  scores = router_scores(logits, np.zeros((1, 2), np.float32), -jnp.inf)
  np.testing.assert_array_equal(route(scores, 4, 4).picks, [[3, 0, 1, 2]])
  np.testing.assert_array_equal(scores[:, :4], router_scores(logits, None))


def test_gradients_of_the_scores_are_those_of_softmax():
  rng = np.random.default_rng(0)
  logits, zero, weight = rng.standard_normal((7, 5)), rng.standard_normal((7, 3)), rng.standard_normal((7, 8))
  logits, zero, weight = (a.astype(np.float32) for a in (logits, zero, weight))
  found = jax.grad(lambda a, b: (router_scores(a, b, 0.7) * weight).sum(), argnums=(0, 1))(logits, zero)
  plain = lambda a, b: (jax.nn.softmax(jnp.concatenate([a, b + 0.7], axis=1)) * weight).sum()
  for got, want in zip(found, jax.grad(plain, argnums=(0, 1))(logits, zero), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-6)


# --- ratios -------------------------------------------------------------------------------------------------------


def test_ratios_per_layer_token_and_sequence():
  picks = np.random.default_rng(0).integers(0, N + NZ, (3, 2, 5, K))
  mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], bool)
  is_zero = (picks >= N).astype(float)
  np.testing.assert_allclose(zeda_jax.zero_expert_ratio(picks, num_experts=N), is_zero.mean(), rtol=1e-6)
  np.testing.assert_allclose(zero_expert_ratio(picks, N, mask), is_zero[:, mask].mean(), rtol=1e-6)
  per_layer = [is_zero[layer][mask].mean() for layer in range(3)]
  np.testing.assert_allclose(zero_expert_ratio(picks, N, mask, axis=(1, 2)), per_layer, rtol=1e-6)
  per_sequence = [is_zero[:, row][:, mask[row]].mean() for row in range(2)]
  np.testing.assert_allclose(zero_expert_ratio(picks, N, mask, axis=(0, 2)), per_sequence, rtol=1e-6)
  per_token = np.where(mask, is_zero.mean(axis=(0, 3)), 0)
  np.testing.assert_allclose(zero_expert_ratio(picks, N, mask, axis=0), per_token, rtol=1e-6)
  assert zero_expert_ratio(picks, N, np.zeros((2, 5))) == 0
  assert zero_expert_ratio(picks[0, 0], N) == is_zero[0, 0].mean().astype(np.float32)


def test_dropped_picks_count_as_skipped():
  assert zero_expert_ratio(np.array([[0, N + NZ], [N, 1]]), N) == 0.5


# --- new router rows ----------------------------------------------------------------------------------------------


def test_new_rows_follow_the_old_ones_per_dimension():
  rng = np.random.default_rng(0)
  rows = (rng.standard_normal((8, 16)) * np.linspace(0.1, 3, 16) + np.linspace(-5, 5, 16)).astype(np.float32)
  new = new_router_rows(rows, 20000, seed=0, layer=0)
  assert new.shape == (20000, 16)
  assert new.dtype == np.float32
  deviation = rows.std(axis=0, ddof=1)
  np.testing.assert_allclose((new.mean(axis=0) - rows.mean(axis=0)) / deviation, 0, atol=0.04)
  np.testing.assert_allclose(new.std(axis=0) / deviation, 1, atol=0.03)  # with N it would be 0.935
  correlation = np.corrcoef(new.T)
  np.testing.assert_allclose(correlation, np.eye(16), atol=0.04)


def test_new_rows_are_seeded_by_seed_and_layer():
  rows = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
  draw = lambda seed, layer, count=3: new_router_rows(rows, count, seed, layer)
  np.testing.assert_array_equal(draw(1, 2), draw(1, 2))
  different = [draw(seed, layer).tobytes() for seed in range(3) for layer in range(3)]
  assert len(set(different)) == 9


def test_new_rows_keep_the_type_and_the_old_rows():
  rows = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
  narrow = rows.astype(jnp.bfloat16)
  before = narrow.copy()
  new = new_router_rows(narrow, 3, 0, 0)
  assert new.dtype == jnp.bfloat16
  np.testing.assert_array_equal(narrow, before)
  wide = new_router_rows(narrow.astype(np.float32), 3, 0, 0)
  np.testing.assert_array_equal(new, wide.astype(jnp.bfloat16))


def test_a_bias_is_widened_by_the_mean_and_deviation_of_its_numbers():
  bias = np.random.default_rng(0).normal(7.0, 0.3, 64).astype(np.float32)
  new = new_router_rows(bias, 20000, seed=0, layer=0)
  assert new.shape == (20000,)
  assert new.dtype == np.float32
  np.testing.assert_allclose(new.mean(), bias.mean(), atol=0.01)
  np.testing.assert_allclose(new.std(), bias.std(ddof=1), rtol=0.03)
  # It does not repeat the numbers that the rows of the same layer are made of.
  row = new_router_rows(bias[:, None], 20000, seed=0, layer=0)[:, 0]
  assert abs(np.corrcoef(row, new)[0, 1]) < 0.03
  np.testing.assert_array_equal(new_router_rows(bias, 5, 1, 2), new_router_rows(bias, 5, 1, 2))


@pytest.mark.parametrize("count", [0, -2])
def test_new_rows_need_a_positive_count(count):
  with pytest.raises(ZedaError, match=f"num_zero_experts is {count}; expected a positive number"):
    new_router_rows(np.ones((4, 2), np.float32), count, 0, 0)
