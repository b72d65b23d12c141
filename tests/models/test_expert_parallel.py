"""Models spread over meshes of eight devices equal the single device: outputs, losses, gradients, picks.

Every test runs in a process of its own with eight fake devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.multiprocess import run_everywhere
from tests.tiny_models import GLM, random_tokens, tiny_model
from zeda_jax.checkpoint.huggingface import load_hf, save_hf
from zeda_jax.models import expert_parallel
from zeda_jax.models.expert_parallel import parallel_experts
from zeda_jax.models.experts import run_experts
from zeda_jax.models.params import merge_model, reconfigured, split_model
from zeda_jax.sharding import Rules, Sharding, make_mesh
from zeda_jax.zero_experts import group_balance_loss, zero_expert_ratio

THIS = "tests.models.test_expert_parallel"
MESHES = ((1, 1), (8, 1), (1, 8), (2, 4), (4, 2))
ALL_CUT = Rules(replicated_below=0)  # tiny parameters are cut like large ones
FAMILIES = {"qwen3": {}, "glm": GLM}
EXPERTS, ZERO, TOP_K, HIDDEN, INNER, TOKENS = 8, 4, 2, 16, 12, 128


def sharding_of(data, expert, **options):
  return Sharding(make_mesh(data, expert, devices=jax.devices()[: data * expert]), **options)


def assert_near(found, expected, name=""):
  """Within 1e-5 of the largest number."""
  found, expected = np.asarray(found), np.asarray(expected)
  scale = max(np.abs(expected).max(), 1e-3)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


# --- one layer's experts ------------------------------------------------------------------------------------------


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  matrices = draw(EXPERTS, HIDDEN, 2 * INNER), draw(EXPERTS, INNER, HIDDEN)
  return rng, draw(TOKENS, HIDDEN), np.abs(draw(TOKENS, TOP_K)), *matrices, draw(TOKENS, HIDDEN)


def random_picks(rng, zero_share):
  picks = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
  return np.where(rng.random(picks.shape) < zero_share, EXPERTS + 1, picks).astype(np.int32)


def with_gradients(function):
  def run(x, picks, weights, gate_up, down, grad):
    experts = lambda *floats: function(floats[0], picks, *floats[1:])
    out, pullback, exchange = jax.vjp(experts, x, weights, gate_up, down, has_aux=True)
    return (out, *pullback(grad)), exchange

  return jax.jit(run)


PLAIN = with_gradients(lambda *arguments: (run_experts(*arguments), None))


def crossings(picks, sharding):
  """Picks of experts that another device holds than the token's, counted one by one."""
  devices = sharding.expert_devices
  count = 0
  for token, row in enumerate(picks):
    home = token // (len(picks) // sharding.num_devices) % devices
    count += sum(pick < EXPERTS and pick // (EXPERTS // devices) != home for pick in row)
  return count


def check_layer():
  for data, expert, capacity in ((8, 1, 1.25), (1, 8, 0.5), (2, 4, 1.25)):
    sharding = sharding_of(data, expert, capacity=capacity, rules=ALL_CUT)
    ours = with_gradients(lambda *arguments, sharding=sharding: parallel_experts(*arguments, sharding))
    check_values_and_counts(ours, sharding)
    check_nan_stays_where_it_is(ours)
  # 13 tokens are no multiple of the devices.
  _, x, weights, *matrices, _ = inputs()
  found, _ = jax.jit(lambda *a: parallel_experts(*a, sharding))(x[:13], np.full((13, 2), 3), weights[:13], *matrices)
  assert_near(found, run_experts(x[:13], np.full((13, 2), 3), weights[:13], *matrices))


def check_values_and_counts(ours, sharding):
  rng, x, weights, *matrices, grad = inputs()
  cases = {share: random_picks(rng, share) for share in (0.0, 0.5, 0.9, 1.0)}
  cases["one expert"] = np.full((TOKENS, TOP_K), 5, np.int32)
  cases["one token"] = np.where(np.arange(TOKENS)[:, None] == 77, [[1, 6]], EXPERTS).astype(np.int32)
  rows = {}
  for name, picks in cases.items():
    (found, exchange), (expected, _) = (f(x, picks, weights, *matrices, grad) for f in (ours, PLAIN))
    for got, want in zip(found, expected, strict=True):
      assert_near(got, want, str(name))
    rows[name] = int(exchange.rows)
    assert rows[name] == crossings(picks, sharding), name
    if name == "one expert" and sharding.expert_devices > 1:
      assert exchange.rounds > 1  # more rows than a buffer has room for: none was dropped
    elif name in (0.9, 1.0):
      assert exchange.rounds == 1
  assert rows[1.0] == 0
  if sharding.expert_devices > 1:
    assert abs(rows[0.5] / rows[0.0] - 0.5) < 0.1 and abs(rows[0.9] / rows[0.0] - 0.1) < 0.05


def check_nan_stays_where_it_is(ours):
  rng, x, weights, *matrices, grad = inputs(2)
  picks = random_picks(rng, 0.5)
  dead = np.arange(TOKENS) % 16 < 3  # the first row of every device's tokens among them
  picks[dead] = EXPERTS
  poisoned, bad_grad = x.copy(), grad.copy()
  poisoned[dead] = bad_grad[dead] = np.nan
  found, _ = ours(poisoned, picks, weights, *matrices, bad_grad)
  expected, _ = ours(x, picks, weights, *matrices, grad)
  for got, want in zip(found[:3], expected[:3], strict=True):
    np.testing.assert_array_equal(got[~dead], want[~dead])
  np.testing.assert_array_equal(found[0][dead], 0)
  np.testing.assert_array_equal(found[1][dead], 0)
  for got, want in zip(found[3:], expected[3:], strict=True):
    np.testing.assert_array_equal(got, want)


# --- the ragged exchange, which only TPUs run ---------------------------------------------------------------------


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
  """jax.lax.ragged_all_to_all by its documentation, one slice per device: everyone sees all and takes its own."""
  me = jax.lax.axis_index(axis_name)
  gather = lambda a: jax.lax.all_gather(a, axis_name)
  everything, starts, sizes, places = map(gather, (operand, input_offsets, send_sizes, output_offsets))
  index = jnp.arange(output.shape[0])
  for sender in range(send_sizes.shape[0]):
    start, size, place = starts[sender, me], sizes[sender, me], places[sender, me]
    size = jnp.where(size == recv_sizes[sender], size, 0)  # the caller must know what comes
    taken = everything[sender][jnp.clip(index - place + start, 0, operand.shape[0] - 1)]
    output = jnp.where(((index >= place) & (index < place + size))[:, None], taken, output)
  return output


def check_ragged():
  jax.lax.ragged_all_to_all = emulated
  expert_parallel._exchange_whole = expert_parallel._exchange_ragged
  sharding = sharding_of(2, 4, capacity=0.6, rules=ALL_CUT)
  ours = with_gradients(lambda *arguments: parallel_experts(*arguments, sharding))
  check_values_and_counts(ours, sharding)
  check_nan_stays_where_it_is(ours)


# --- whole models -------------------------------------------------------------------------------------------------


@jax.jit
def _balance(routing, live):
  return group_balance_loss(routing.scores, routing.picks, EXPERTS, 2.0, 0.1, live)


def loss_and_gradients(graphdef):
  def loss(params, tokens, segment_ids, bias):
    model = merge_model(graphdef, params)
    out = model.hidden(tokens, segment_ids, zero_expert_bias=bias, aux_loss=_balance)
    logits = model.logits(out.hidden)
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, jnp.roll(tokens, -1, axis=1)[..., None], axis=-1)[..., 0]
    cross_entropy = -jnp.where(segment_ids > 0, chosen, 0).sum() / (segment_ids > 0).sum()
    return cross_entropy + out.aux_loss.sum(), (logits, out)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def check_model(family, meshes):
  model = tiny_model(num_experts=EXPERTS, num_zero_experts=ZERO, **FAMILIES[family])
  graphdef, params = split_model(model)
  if family == "glm":  # a bias of 1e4 gives zero experts the score 1, and corrections must not undo that
    router = params["runs"][1]["mlp"]["router"]
    router["correction_bias"] = -0.1 * jnp.abs(router["correction_bias"])
    router["zero_correction_bias"] = 0.1 * jnp.abs(router["zero_correction_bias"])
  tokens, segment_ids = random_tokens((8, 12)), np.ones((8, 12), np.int32)
  segment_ids[:, 7:] = 2
  segment_ids[3] = 0  # a device without a live token
  segment_ids[5, 9:] = 0
  biases = (-np.inf, 0.0, 1e4)
  reference = loss_and_gradients(graphdef)
  expected = [reference(params, tokens, segment_ids, bias) for bias in biases]
  ratios = [zero_expert_ratio(e[0][1][1].picks, EXPERTS) for e in expected]
  assert ratios[0] == 0 and 0.1 < ratios[1] < 0.9 and ratios[2] == 1, ratios
  for mesh in meshes:
    sharding = sharding_of(*mesh, rules=ALL_CUT)
    run = loss_and_gradients(split_model(reconfigured(model, sharding=sharding))[0])
    placed = jax.device_put(params, sharding.state(params))
    batch = jax.device_put((tokens, segment_ids), sharding.batch((tokens, segment_ids)))
    rows = []
    for bias, want in zip(biases, expected, strict=True):
      (loss, (logits, out)), grads = run(placed, *batch, bias)
      (want_loss, (want_logits, want_out)), want_grads = want
      np.testing.assert_array_equal(out.picks, want_out.picks)
      live = segment_ids > 0
      assert_near(logits[live], want_logits[live], f"{mesh} {bias}")
      assert_near(loss, want_loss)
      assert_near(out.aux_loss, want_out.aux_loss)
      jax.tree.map(assert_near, grads, want_grads)
      rows.append(out.exchange.rows.sum())
    if mesh[1] > 1:
      assert rows[0] > rows[1] > rows[2] == 0
    else:
      assert rows == [0, 0, 0]


def check_loading(directory):
  model = tiny_model(num_experts=EXPERTS, num_zero_experts=ZERO)
  save_hf(model, directory)
  sharding = sharding_of(2, 4, rules=ALL_CUT)
  loaded = split_model(reconfigured(load_hf(directory, sharding=sharding.parameter), sharding=sharding))[1]
  for leaf, where in zip(jax.tree.leaves(loaded), jax.tree.leaves(sharding.state(loaded)), strict=True):
    assert leaf.sharding == where
  jax.tree.map(np.testing.assert_array_equal, loaded, split_model(model)[1])
  down = loaded["runs"][0]["mlp"]["experts"]["down"]
  assert down.addressable_shards[0].data.shape == (2, EXPERTS // 4, 24, 32 // 2)


# --- in a process of its own --------------------------------------------------------------------------------------


def in_child(check, *arguments):
  run_everywhere(f"{THIS}:{check}", 1, 8, *arguments)


def test_experts_on_meshes_equal_one_device_and_rows_are_counted():
  in_child("check_layer")


def test_the_ragged_exchange_is_called_as_documented():
  in_child("check_ragged")


@pytest.mark.parametrize(
  ("family", "meshes"),
  [
    ("qwen3", ((1, 1), (8, 1), (2, 4))),
    ("glm", ((1, 8), (4, 2))),
    pytest.param("qwen3", MESHES, marks=pytest.mark.slow),
    pytest.param("glm", MESHES, marks=pytest.mark.slow),
  ],
)
def test_models_on_meshes_equal_one_device(family, meshes):
  in_child("check_model", family, meshes)


def test_a_checkpoint_is_read_right_into_its_shards(tmp_path):
  in_child("check_loading", tmp_path / "model")
