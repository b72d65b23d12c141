"""What the decoder promises beside the right logits: the masked teacher, packing, padding, rematerialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_models import GLM, forward, random_tokens, tiny_config, tiny_model
from zeda_jax.errors import ZedaError
from zeda_jax.models import experts
from zeda_jax.models.decoder import Decoder, DecoderOutput, abstract_decoder, inject, segment_positions
from zeda_jax.models.params import merge_model, reconfigured, split_model
from zeda_jax.router_rows import new_router_rows

TOKENS = random_tokens((2, 24))

VARIANTS = {
  "not normalised, bias, dense between": {
    "norm_topk_prob": False,
    "attention_bias": True,
    "moe_layers": (True, False, True),
  },
  "odd sizes": {"num_experts": 7, "num_experts_per_tok": 3, "hidden_size": 40, "moe_layers": (True,)},
  "all experts picked": {"num_experts_per_tok": 6, "moe_layers": (True,)},
  "many experts": {"num_experts": 33, "num_experts_per_tok": 4, "moe_layers": (True,)},
  "bfloat16": {"dtype": "bfloat16"},
  "sigmoid router, latent attention, bfloat16": {**GLM, "dtype": "bfloat16"},
  "groups": {**GLM, "num_groups": 3, "top_groups": 2, "num_experts_per_tok": 3, "moe_layers": (True,)},
}


def cast(model: Decoder, dtype: str) -> Decoder:
  graphdef, params = split_model(model)
  return merge_model(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), params))


def assert_equal_outputs(found: DecoderOutput, expected: DecoderOutput) -> None:
  np.testing.assert_array_equal(found.logits, expected.logits)
  np.testing.assert_array_equal(found.picks, expected.picks)
  np.testing.assert_array_equal(found.pick_weights, expected.pick_weights)


# --- zero_expert_bias ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_masked_zero_experts_give_the_original_bit_for_bit(options):
  original = cast(tiny_model(**options), options.get("dtype", "float32"))
  expected = forward(original, TOKENS)
  for seed in range(4):
    twin = inject(original, seed=seed)
    assert_equal_outputs(forward(twin, TOKENS, zero_expert_bias=-jnp.inf), expected)
    assert (forward(twin, TOKENS).logits != expected.logits).any()  # without the mask it differs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_zero_experts_without_jit(dtype):
  original = cast(tiny_model(dtype=dtype, moe_layers=(True,)), dtype)
  twin = inject(original, 11)  # more zero experts than experts
  assert_equal_outputs(twin(TOKENS, zero_expert_bias=-jnp.inf), original(TOKENS))


def test_gradients_of_the_masked_twin_are_the_originals():
  original = tiny_model(moe_layers=(True,))
  twin = inject(original, 3)

  def gradients(model, bias):
    graphdef, params = split_model(model)
    return jax.jit(jax.grad(lambda p: (merge_model(graphdef, p)(TOKENS, zero_expert_bias=bias).logits ** 2).sum()))(
      params
    )

  expected, found = gradients(original, 0.0), gradients(twin, -jnp.inf)
  for run in found["runs"].values():
    zero = run["mlp"]["router"].pop("zero_weight")
    np.testing.assert_array_equal(zero, 0.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_a_large_bias_makes_every_pick_a_zero_expert():
  model = inject(tiny_model(), 3)
  out = forward(model, TOKENS, zero_expert_bias=1e4)
  assert (np.asarray(out.picks) >= 6).all()
  graphdef, params = split_model(model)
  down = params["runs"][0]["mlp"]["experts"]["down"]
  params["runs"][0]["mlp"]["experts"]["down"] = jnp.zeros_like(down)
  without_experts = merge_model(graphdef, params)
  np.testing.assert_array_equal(out.logits, forward(without_experts, TOKENS).logits)


def test_the_bias_is_a_dial():
  model = inject(tiny_model(), 3)
  biases = (-100.0, -3.0, -1.0, 0.0, 1.0, 3.0, 100.0)
  ratios = [float((forward(model, TOKENS, zero_expert_bias=bias).picks[0] >= 6).mean()) for bias in biases]
  assert ratios == sorted(ratios)
  assert ratios[0] == 0.0
  assert ratios[-1] == 1.0
  assert len(set(ratios)) >= 5


# --- injection ----------------------------------------------------------------------------------------------------


def test_injection_shares_everything_but_the_new_rows():
  original = tiny_model(moe_layers=(True, False, True))
  twin = inject(original, seed=5)
  assert twin.config == original.config.replace(num_zero_experts=3)
  before = dict(jax.tree_util.tree_leaves_with_path(split_model(original)[1]))
  after = dict(jax.tree_util.tree_leaves_with_path(split_model(twin)[1]))
  new = after.keys() - before.keys()
  assert [jax.tree_util.keystr(path) for path in sorted(new, key=str)] == [
    f"['runs'][{run}]['mlp']['router']['zero_weight']" for run in (0, 2)
  ]
  assert all(after[path] is before[path] for path in before)
  first, last = (twin.runs[run].mlp.router.zero_weight[...] for run in (0, 2))
  assert first.shape == last.shape == (1, 3, 32)
  assert not np.array_equal(first, last)  # every layer draws its own
  assert np.array_equal(first, inject(original, seed=5).runs[0].mlp.router.zero_weight[...])
  assert not np.array_equal(first, inject(original, seed=6).runs[0].mlp.router.zero_weight[...])


def test_injection_depends_on_the_layer_not_on_its_run():
  together = tiny_model(moe_layers=(True, True, True))
  graphdef, params = split_model(tiny_model(moe_layers=(True, False, True)))
  rows = together.runs[0].mlp.router.weight[...]
  params["runs"][2]["mlp"]["router"]["weight"] = rows[2:]
  apart = inject(merge_model(graphdef, params), seed=1)
  np.testing.assert_array_equal(
    apart.runs[2].mlp.router.zero_weight[0], inject(together, seed=1).runs[0].mlp.router.zero_weight[2]
  )


def test_injection_widens_the_correction_bias_and_shares_the_old_one():
  original = tiny_model(**GLM | {"moe_layers": (False, True, True)})
  twin = inject(original, seed=5)
  before, after = original.runs[1].mlp.router, twin.runs[1].mlp.router
  assert after.correction_bias[...] is before.correction_bias[...]
  assert after.zero_correction_bias.shape == (2, 3)
  for place, layer in enumerate((1, 2)):
    old = np.asarray(before.correction_bias[...])[place]
    np.testing.assert_array_equal(after.zero_correction_bias[place], new_router_rows(old, 3, 5, layer))


@pytest.mark.parametrize("count", [0, -1])
def test_injection_needs_a_positive_count(count):
  with pytest.raises(ZedaError, match=f"num_zero_experts is {count}; expected a positive number"):
    inject(tiny_model(), count)


def test_injection_takes_a_static_model():
  with pytest.raises(ZedaError, match="already has 2 zero experts"):
    inject(inject(tiny_model(), 2), 2)


# --- packing and padding ------------------------------------------------------------------------------------------

PARTS = [random_tokens((n,), seed=n) for n in (11, 7, 16)]


@pytest.fixture(scope="module")
def packed():
  model = inject(tiny_model(moe_layers=(True, False, True)), 3)
  tokens, segments = np.zeros((2, 24), np.int32), np.zeros((2, 24), np.int32)
  tokens[0, :11], tokens[0, 11:18], tokens[1, :16] = PARTS
  segments[0, :11], segments[0, 11:18], segments[1, :16] = 1, 2, 1
  return model, tokens, segments


def test_packed_rows_equal_separate_rows(packed):
  model, tokens, segments = packed
  out = forward(model, tokens, segments)
  rows = np.zeros((3, 16), np.int32)  # what comes after a part is in its future
  for row, part in zip(rows, PARTS, strict=True):
    row[: len(part)] = part
  alone = forward(model, rows)
  for i, (row, start) in enumerate(((0, 0), (0, 11), (1, 0))):
    length = len(PARTS[i])
    where = (row, slice(start, start + length))
    np.testing.assert_allclose(out.logits[where], alone.logits[i, :length], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(out.picks[:, *where], alone.picks[:, i, :length])


def test_what_lies_in_the_padding_does_not_matter(packed):
  model, tokens, segments = packed
  other = np.where(segments == 0, random_tokens(tokens.shape, seed=9), tokens)
  assert (other != tokens).any()
  real = segments > 0
  np.testing.assert_array_equal(
    forward(model, tokens, segments).logits[real], forward(model, other, segments).logits[real]
  )


def test_other_segments_do_not_matter(packed):
  model, tokens, segments = packed
  other = np.where(segments == 1, random_tokens(tokens.shape, seed=9), tokens)
  second = segments == 2
  np.testing.assert_array_equal(
    forward(model, tokens, segments).logits[second], forward(model, other, segments).logits[second]
  )


def test_positions_restart_with_each_segment():
  segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [3, 4, 4, 4, 4, 4, 0]])
  expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 0]]
  np.testing.assert_array_equal(segment_positions(segments, segments.shape), expected)
  np.testing.assert_array_equal(segment_positions(None, (2, 3)), [[0, 1, 2]] * 2)


def test_only_picks_of_real_tokens_for_normal_experts_are_multiplied(packed, monkeypatch):
  model, tokens, segments = packed
  real = experts.grouped_matmul
  rows = []

  def counting(lhs, rhs, group_sizes, **kwargs):
    jax.debug.callback(lambda sizes: rows.append(int(sizes.sum())), group_sizes)
    return real(lhs, rhs, group_sizes, **kwargs)

  monkeypatch.setattr(experts, "grouped_matmul", counting)
  graphdef, params = split_model(model)
  run = jax.jit(lambda bias: merge_model(graphdef, params)(tokens, segments, zero_expert_bias=bias).picks)
  for bias in (0.0, -jnp.inf, 1e4):
    rows.clear()
    real_picks = np.asarray(run(bias))[:, segments > 0]
    jax.effects_barrier()
    assert sum(rows) == (real_picks < 6).sum()  # grouped_matmul runs once per layer: the down product
    expected = {0.0: None, 1e4: 0}.get(bias, real_picks.size)
    assert expected is None or sum(rows) == expected


# --- variants of one model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["layer", "dots"])
def test_rematerialisation_changes_no_gradient(remat):
  model = inject(tiny_model(moe_layers=(True,)), 3)

  def gradients(model):
    graphdef, params = split_model(model)
    loss = lambda p: (merge_model(graphdef, p)(TOKENS).logits ** 2).mean()
    return jax.jit(jax.value_and_grad(loss))(params)

  def has_remat(model):
    graphdef, params = split_model(model)
    return "remat" in str(jax.make_jaxpr(lambda p: merge_model(graphdef, p)(TOKENS).logits)(params))

  again = reconfigured(model, remat=remat)
  assert (has_remat(model), has_remat(again)) == (False, True)
  (loss, expected), (loss_again, found) = gradients(model), gradients(again)
  np.testing.assert_allclose(loss_again, loss, rtol=1e-6)
  assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 0  # every parameter has a gradient
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_unrolling_the_scan_changes_nothing():
  model = inject(tiny_model(moe_layers=(True, True, True, False)), 3)
  out, unrolled = forward(model, TOKENS), forward(reconfigured(model, scan_unroll=2), TOKENS)
  np.testing.assert_allclose(unrolled.logits, out.logits, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(unrolled.picks, out.picks)


def test_bf16_activations_stay_near_fp32():
  model = inject(tiny_model(num_experts_per_tok=6), 3)
  narrow = reconfigured(model, dtype="bfloat16")
  out, exact = forward(narrow, TOKENS), forward(model, TOKENS)
  assert out.logits.dtype == out.pick_weights.dtype == jnp.float32
  assert jax.eval_shape(narrow.hidden, TOKENS).hidden.dtype == jnp.bfloat16
  error = np.abs(np.asarray(out.logits - exact.logits))
  assert 0 < error.mean() < 0.03 * float(exact.logits.std())


def test_a_dense_layer_reports_no_picks():
  out = jax.eval_shape(tiny_model(moe_layers=(False, True, False, True, True)), TOKENS)
  assert out.logits.shape == (2, 24, 64)
  assert out.picks.shape == out.pick_weights.shape == (3, 2, 24, 2)
  assert out.picks.dtype == jnp.int32


def test_logits_are_the_head_applied_to_the_hidden_states():
  hidden = np.random.default_rng(0).standard_normal((2, 3, 32), np.float32)
  untied, tied = tiny_model(), tiny_model(tie_word_embeddings=True)
  np.testing.assert_allclose(untied.logits(hidden), hidden @ untied.lm_head.kernel[...], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(tied.logits(hidden), hidden @ tied.embed.embedding[...].T, rtol=1e-5, atol=1e-5)


def test_auxiliary_losses_are_reported_per_moe_layer_for_real_tokens():
  model = inject(tiny_model(moe_layers=(True, False, True)), 3)
  segments = np.ones((2, 24), np.int32)
  segments[1, 5:] = 0
  count = lambda routing, live: jnp.where(live[:, None], routing.picks >= 6, False).sum().astype(jnp.float32)
  out = model.hidden(TOKENS, segments, aux_loss=count)
  expected = (np.asarray(out.picks)[:, segments > 0] >= 6).sum(axis=(1, 2))
  np.testing.assert_array_equal(out.aux_loss, expected)


def test_abstract_decoder_has_the_documented_parameters():
  config = tiny_config(moe_layers=(False, True, True), num_zero_experts=3, attention_bias=True)
  shapes = jax.tree.map(lambda leaf: leaf.shape, split_model(abstract_decoder(config))[1])
  norms = {"input_norm": {"scale": (32,)}, "post_attention_norm": {"scale": (32,)}}
  attention = {
    "q_proj": {"kernel": (32, 64), "bias": (64,)},
    "k_proj": {"kernel": (32, 32), "bias": (32,)},
    "v_proj": {"kernel": (32, 32), "bias": (32,)},
    "o_proj": {"kernel": (64, 32), "bias": (32,)},
    "q_norm": {"scale": (16,)},
    "k_norm": {"scale": (16,)},
  }
  dense = {"gate_proj": {"kernel": (32, 48)}, "up_proj": {"kernel": (32, 48)}, "down_proj": {"kernel": (48, 32)}}
  router = {"weight": (6, 32), "zero_weight": (3, 32)}
  sparse = {"router": router, "experts": {"gate_up": (6, 32, 48), "down": (6, 24, 32)}}

  def stacked(length, mlp):
    run = {**norms, "attention": attention, "mlp": mlp}
    return jax.tree.map(lambda shape: (length, *shape), run, is_leaf=lambda x: isinstance(x, tuple))

  assert shapes == {
    "embed": {"embedding": (64, 32)},
    "runs": {0: stacked(1, dense), 1: stacked(2, sparse)},
    "final_norm": {"scale": (32,)},
    "lm_head": {"kernel": (32, 64)},
  }
