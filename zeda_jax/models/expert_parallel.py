"""Experts spread over the devices of a mesh: rows travel to the devices that hold their experts, and back.

Each of the D devices along the "expert" axis has tokens of its own and N / D of the experts. In one layer it

  plan       sorts its picks by expert; those that run no expert (ids >= N) come last and go nowhere
  there      packs the rows for each device into a buffer [D, C, H] and exchanges the buffers
  experts    sorts what came by expert and runs its own experts on it, scaled by the router's weights
  back       exchanges the results and adds them to the tokens they belong to

C follows from `Sharding.capacity`. Rows that find no room in a buffer travel in another round of the last three steps;
the fullest buffer of the whole mesh decides how many rounds there are, so no row is ever dropped, and memory does not
depend on the routing. The backward pass makes the rounds again with the gradients' rows beside; it keeps no buffer.

On TPUs only the rows themselves are sent (`ragged_all_to_all`); elsewhere, and on the v5e slices whose compiler lacks
that (`Sharding.ragged`), whole buffers.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.models.experts import inverse, run_experts
from zeda_jax.ops.grouped_matmul import grouped_matmul, grouped_swiglu
from zeda_jax.ops.platforms import by_platform
from zeda_jax.ops.varying import vary_alike, zeros
from zeda_jax.sharding import Exchange, Sharding, gather

FURTHER_ROUNDS = "further_rounds"  # name of the loop that usually makes none
_ROWS = 8  # a buffer's room for one device is a multiple of this, as TPU memory is tiled


def parallel_experts(
  x: Float[Array, "T H"],
  picks: Int[Array, "T K"],
  weights: Float[Array, "T K"],
  gate_up: Float[Array, "N H 2F"],
  down: Float[Array, "N F H"],
  sharding: Sharding,
  backend: str | None = None,
) -> tuple[Float[Array, "T H"], Exchange]:
  """`run_experts` on all devices of a mesh, and what was sent for it. Arrays are global, however they are sharded.

  Differentiable in x, weights, gate_up and down; the experts' gradients are summed over all tokens of the mesh.

  Args:
    x: tokens; those that pick no expert may hold NaN, which reaches no other token and no gradient.
    picks: ids >= N cost nothing, neither rows nor bytes.
    weights: of the picks.
    gate_up, down: the experts' matrices.
    sharding: mesh, rules and capacity.
    backend: grouped_matmul's.

  Raises:
    ZedaError: the experts cannot be spread evenly over the mesh.
  """
  num_tokens = x.shape[0]
  missing = -num_tokens % sharding.num_devices
  if missing:  # tokens that pick nothing, so that every device has equally many
    x, weights = (jnp.pad(a, ((0, missing), (0, 0))) for a in (x, weights))
    picks = jnp.pad(picks, ((0, missing), (0, 0)), constant_values=gate_up.shape[0])
  tokens = PartitionSpec(sharding.rules.tokens)
  specs = tuple(sharding.spec(("experts",), matrix.shape) for matrix in (gate_up, down))

  def on_device(x, picks, weights, *matrices):
    whole = (gather(matrix, PartitionSpec(None, *spec[1:])) for matrix, spec in zip(matrices, specs, strict=True))
    return _run_on_device(sharding, backend, *vary_alike(x, picks, weights, *whole))

  run = jax.shard_map(
    on_device, mesh=sharding.mesh, in_specs=(tokens, tokens, tokens, *specs), out_specs=(tokens, PartitionSpec())
  )
  out, exchange = run(x, picks, weights, gate_up, down)
  return out[:num_tokens], exchange


def _run_on_device(sharding: Sharding, backend: str | None, x, picks, weights, gate_up, down):
  devices, axes = sharding.expert_devices, sharding.rules.experts
  if devices == 1:  # every device has all experts
    return run_experts(x, picks, weights, gate_up, down, backend), Exchange(jnp.int32(0), jnp.int32(1))
  even = picks.size / devices
  capacity = min(-(-max(int(even * sharding.capacity + 0.5), 1) // _ROWS) * _ROWS, picks.size)
  options = _Options(devices, capacity, axes, sharding.mesh.axis_names, sharding.ragged, backend)
  with jax.named_scope("dispatch"):
    plan = _make_plan(picks, gate_up.shape[0], options)
  out = _exchanged_experts(x, weights, gate_up, down, plan, options)
  sent = plan.sizes.sum() - plan.sizes[jax.lax.axis_index(axes)]
  return out, Exchange(jax.lax.psum(sent, options.all_axes), jnp.maximum(plan.rounds, 1))


class _Options(NamedTuple):
  devices: int  # D
  capacity: int  # C
  axes: tuple[str, ...]  # along which rows are exchanged
  all_axes: tuple[str, ...]
  ragged: bool  # whether TPUs exchange rows rather than whole buffers
  backend: str | None


class _Plan(NamedTuple):
  """Which row goes where, over all rounds. A stream is what one device has for one other, sorted by expert."""

  order: Int[Array, " M"]  # sorted row -> (token, slot)
  device: Int[Array, "T K"]  # to which a pick goes; D where it goes nowhere
  place: Int[Array, "T K"]  # of a pick in its stream
  starts: Int[Array, " D"]  # first sorted row of the stream for each device
  sizes: Int[Array, " D"]  # rows in it
  received: Int[Array, "D n"]  # rows in the stream from each device, by local expert
  rounds: Int[Array, ""]  # the same on all devices of the mesh


def _make_plan(picks: Int[Array, "T K"], local_experts: int, options: _Options) -> _Plan:
  num_experts = local_experts * options.devices
  ids = jnp.minimum(picks, num_experts).reshape(-1).astype(jnp.int32)
  order = jnp.argsort(ids, stable=True)
  row_of = inverse(order).reshape(picks.shape)
  counts = jnp.bincount(ids, length=num_experts + 1)[:num_experts].astype(jnp.int32)
  counts = counts.reshape(options.devices, local_experts)
  sizes = counts.sum(axis=1)
  starts = jnp.cumsum(sizes) - sizes
  device = ids.reshape(picks.shape) // local_experts
  place = row_of - starts[jnp.minimum(device, options.devices - 1)]
  received = jax.lax.all_to_all(counts, options.axes, 0, 0, tiled=True)
  # Devices of other groups exchange nothing with these, but one program runs on all: they make as many rounds.
  rounds = jax.lax.pmax(-(-sizes.max() // options.capacity), options.all_axes)
  return _Plan(order, device, place, starts, sizes, received, rounds)


class _Round:
  """One round of exchanges: places C * i ... C * (i + 1) of every stream."""

  def __init__(self, plan: _Plan, index: Int[Array, ""] | int, options: _Options):
    self.plan, self.options = plan, options
    self.first = index * options.capacity
    capacity = options.capacity
    place = self.first + jnp.arange(capacity, dtype=jnp.int32)
    self.live: Bool[Array, "D C"] = place < plan.sizes[:, None]
    rows = jnp.where(self.live, plan.starts[:, None] + place, 0)
    self.picks: Int[Array, "D C"] = plan.order[rows]  # of (token, slot)
    # What comes: the place in a stream tells the expert, since the stream is sorted; past the stream's end it is n.
    ends = jnp.cumsum(plan.received, axis=1)
    experts = (place[None, :, None] >= ends[:, None, :]).sum(axis=-1).reshape(-1)
    self.order: Int[Array, " D*C"] = jnp.argsort(experts, stable=True)  # received rows, sorted by expert
    local = plan.received.shape[1]
    self.group_sizes: Int[Array, " n"] = jnp.bincount(experts, length=local + 1)[:local].astype(jnp.int32)
    self.sent: Int[Array, " D"] = jnp.clip(plan.sizes - self.first, 0, capacity)
    self.received: Int[Array, " D"] = jnp.clip(ends[:, -1] - self.first, 0, capacity)

  def rows_there(self, x: Float[Array, "T H"]) -> Float[Array, "D*C H"]:
    """The tokens of all picks of this round for the device's experts, sorted by expert; what follows means nothing."""
    with jax.named_scope("there"):
      buffers = x[self.picks // self.plan.device.shape[1]]
      return _exchange_rows(buffers, self.sent, self.received, self.options).reshape(-1, x.shape[1])[self.order]

  def rows_back(self, rows: Float[Array, "D*C H"]) -> Float[Array, "T H"]:
    """The sum over each token's picks of this round of what `rows` holds for them, in fp32."""
    with jax.named_scope("back"):
      buffers = rows[inverse(self.order)].reshape(self.options.devices, self.options.capacity, -1)
      rows = _exchange_rows(buffers, self.received, self.sent, self.options).reshape(rows.shape)
      total = zeros((self.plan.device.shape[0], rows.shape[1]), jnp.float32, like=rows)
      at, mine = self._places()
      for k in range(at.shape[1]):  # slot by slot, so that no [T, K, H] array is made
        total += jnp.where(mine[:, k, None], rows[at[:, k]].astype(jnp.float32), 0)
      return total

  def numbers_there(self, weights: Float[Array, "T K"]) -> Float[Array, "D*C"]:
    """The weight of every row of `rows_there`; 0 past the live rows. One number a row: whole buffers are sent."""
    buffers = jnp.where(self.live, weights.reshape(-1)[self.picks], 0)
    return jax.lax.all_to_all(buffers, self.options.axes, 0, 0, tiled=True).reshape(-1)[self.order]

  def numbers_back(self, numbers: Float[Array, "D*C"]) -> Float[Array, "T K"]:
    """For every pick of this round the number of its row, 0 for other picks."""
    buffers = numbers[inverse(self.order)].reshape(self.options.devices, self.options.capacity)
    at, mine = self._places()
    numbers = jax.lax.all_to_all(buffers, self.options.axes, 0, 0, tiled=True).reshape(-1)
    return jnp.where(mine, numbers[at], 0)

  def _places(self) -> tuple[Int[Array, "T K"], Bool[Array, "T K"]]:
    """Where each pick lies in the buffers that this device sent, and whether it does."""
    device, capacity = self.plan.device, self.options.capacity
    place = self.plan.place - self.first
    mine = (device < self.options.devices) & (place >= 0) & (place < capacity)
    return jnp.where(mine, device * capacity + place, 0), mine


def _exchange_rows(
  buffers: Float[Array, "D C H"], sent: Int[Array, " D"], received: Int[Array, " D"], options: _Options
) -> Float[Array, "D C H"]:
  """buffers[d] goes to device d, and what device d has for this one comes to [d]; the first sent[d] rows count."""
  return by_platform(
    *vary_alike(buffers, sent, received),
    result=jax.ShapeDtypeStruct(buffers.shape, buffers.dtype),
    functions={"tpu": functools.partial(_exchange_ragged, axes=options.axes)} if options.ragged else {},
    default=functools.partial(_exchange_whole, axes=options.axes),
  )


def _exchange_whole(buffers: Array, sent: Array, received: Array, axes: tuple[str, ...]) -> Array:
  return jax.lax.all_to_all(buffers, axes, 0, 0, tiled=True)


def _exchange_ragged(buffers: Array, sent: Array, received: Array, axes: tuple[str, ...]) -> Array:
  devices, capacity, width = buffers.shape
  starts = jnp.arange(devices, dtype=jnp.int32) * capacity
  # On every receiver this device's rows start where its own buffer does.
  there = jnp.full(devices, jax.lax.axis_index(axes) * capacity, jnp.int32)
  out = zeros((devices * capacity, width), buffers.dtype, like=buffers)
  operands = vary_alike(buffers.reshape(out.shape), out, starts, sent, there, received)
  return jax.lax.ragged_all_to_all(*operands, axis_name=axes).reshape(buffers.shape)


def _weighted_experts(
  rows: Float[Array, "M H"],
  weights: Float[Array, " M"],
  gate_up: Float[Array, "n H 2F"],
  down: Float[Array, "n F H"],
  group_sizes: Int[Array, " n"],
  backend: str | None,
) -> Float[Array, "M H"]:
  """weight * expert(row) of each row. Weighting before the second product makes the backward pass need its input only:
  the gradient of a weight is then a sum over F, and no result has to be made again."""
  act = grouped_swiglu(rows, gate_up, group_sizes, backend=backend)
  weighted = (act * weights[:, None].astype(jnp.float32)).astype(rows.dtype)
  return grouped_matmul(weighted, down, group_sizes, backend=backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _exchanged_experts(x, weights, gate_up, down, plan: _Plan, options: _Options) -> Float[Array, "T H"]:
  def one_round(index: Any) -> Float[Array, "T H"]:
    trip = _Round(plan, index, options)
    rows, factors = trip.rows_there(x), trip.numbers_there(weights)
    with jax.named_scope("experts"):
      out = _weighted_experts(rows, factors, gate_up, down, trip.group_sizes, options.backend)
    return trip.rows_back(out)

  return _sum_of_rounds(one_round, plan.rounds).astype(x.dtype)


def _sum_of_rounds(one_round: Any, rounds: Int[Array, ""]) -> Any:
  """The sum of one_round(i). The first stands outside the loop, where the compiler can overlap it with other work."""
  add = lambda index, total: jax.tree.map(jnp.add, total, one_round(index))
  first = one_round(0)
  with jax.named_scope(FURTHER_ROUNDS):
    return jax.lax.fori_loop(1, rounds, add, first)


def _forward(x, weights, gate_up, down, plan, options):
  return _exchanged_experts(x, weights, gate_up, down, plan, options), (x, weights, gate_up, down, plan)


def _backward(options, residuals, grad):
  x, weights, gate_up, down, plan = residuals

  def one_round(index: Any) -> tuple[Array, ...]:
    trip = _Round(plan, index, options)
    rows, factors, d_out = trip.rows_there(x), trip.numbers_there(weights), trip.rows_there(grad)
    with jax.named_scope("experts"):
      run = functools.partial(_weighted_experts, group_sizes=trip.group_sizes, backend=options.backend)
      d_rows, d_factors, d_gate_up, d_down = jax.vjp(run, rows, factors, gate_up, down)[1](d_out)
    return trip.rows_back(d_rows), trip.numbers_back(d_factors), d_gate_up, d_down

  d_x, d_weights, d_gate_up, d_down = _sum_of_rounds(one_round, plan.rounds)
  return d_x.astype(x.dtype), d_weights.astype(weights.dtype), d_gate_up, d_down, None


_exchanged_experts.defvjp(_forward, _backward)
