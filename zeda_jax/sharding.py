"""How a model is spread over devices: a mesh of two axes, and along which of them each kind of array is cut.

  tokens                  over both axes: every device has rows of the batch of its own
  experts                 over "expert"; tokens travel to them (models/expert_parallel.py)
  an expert's matrices    over "data", along their rows where that gives whole tiles; gathered where they are used
  everything else         over both axes, likewise

So each number of the model, and of the optimizer's state, is held once in the whole mesh, but for what is so small that
gathering it costs more than holding it. Matrices that meet many tokens are gathered explicitly (`Sharding.on_rows`),
which also makes the sum of their gradients leave each device its part; the rest is left to the compiler, which sees the
arrays' shardings.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from zeda_jax.errors import ZedaError

MESH_AXES = ("data", "expert")
# A TPU holds the last two sides of an array in tiles. Parts of whole tiles are gathered and reduce-scattered as they
# lie; other parts are copied, or the compiler all-reduces the whole array, which sends twice as much.
_TILE = (8, 128)


class Exchange(NamedTuple):
  """What one MoE layer sent between devices in a forward pass; rows for a device's own experts do not travel.

  Attributes:
    rows: sent to another device to be worked on, summed over all devices; as many come back.
    rounds: exchanges it took, 1 unless a buffer was too small for the routing (see `Sharding.capacity`).
  """

  rows: Int[Array, "*layers"]
  rounds: Int[Array, "*layers"]


# The TPU compiler refuses ragged exchanges on slices of a v5e whose chips are not all routed to each other: those of
# more chips than this.
_RAGGED_V5E = ("TPU v5 lite", 16)


def ragged_exchange(device_kind: str, devices: int) -> bool:
  """Whether a TPU slice of so many devices can exchange just the rows that travel, rather than whole buffers."""
  kind, most = _RAGGED_V5E
  return device_kind != kind or devices <= most


@dataclasses.dataclass(frozen=True)
class Rules:
  """Logical axis -> the mesh axes it is cut along."""

  tokens: tuple[str, ...] = ("data", "expert")  # rows of a batch, or tokens in a row
  experts: tuple[str, ...] = ("expert",)  # the experts of stacked matrices
  expert_matrix: tuple[str, ...] = ("data",)  # a side of each expert's matrix
  parameter: tuple[str, ...] = ("data", "expert")  # one or two sides of any other parameter
  replicated_below: int = 2**16  # so many numbers in a layer of a parameter; every device holds smaller ones whole


@dataclasses.dataclass(frozen=True)
class Sharding:
  """A mesh and its rules. Hashable: as `ModelConfig.sharding` it is a static part of a model.

  Attributes:
    mesh: with the axes of MESH_AXES (see `make_mesh`).
    rules: what is cut along which axis.
    capacity: how many rows the exchange between experts' devices has room for, relative to an even share of all picks.
      Below 1 it saves memory where zero experts take many picks; rows that find no room travel in another round.

  Raises:
    ZedaError: the mesh has other axes, or the capacity is not positive.
  """

  mesh: Mesh
  rules: Rules = Rules()
  capacity: float = 1.25

  def __post_init__(self) -> None:
    if self.mesh.axis_names != MESH_AXES:
      raise ZedaError(f"The mesh has the axes {self.mesh.axis_names}; expected {MESH_AXES}: make it with make_mesh.")
    if self.capacity <= 0:
      raise ZedaError(f"capacity is {self.capacity}; expected a positive number, such as 1.25.")

  @property
  def num_devices(self) -> int:
    return self.mesh.size

  @property
  def expert_devices(self) -> int:
    """Over how many devices the experts of a layer are spread."""
    return self._ways(self.rules.experts)

  @property
  def ragged(self) -> bool:
    """Whether rows are exchanged by `ragged_all_to_all` on a TPU; meshes without devices say yes."""
    devices = _devices(self.mesh)
    return devices is None or ragged_exchange(devices.flat[0].device_kind, devices.size)

  def for_generation(self, num_experts: int) -> "Sharding":
    """The same devices while tokens are generated, a few at a time: gathering matrices would take most of the time.

    Experts are spread over as many devices as can share them evenly; everything else is whole on every device.
    """
    expert = math.gcd(self.num_devices, num_experts)
    shape = (self.num_devices // expert, expert)
    devices = _devices(self.mesh)
    mesh: Any = AbstractMesh(shape, MESH_AXES)
    if devices is not None:
      mesh = Mesh(devices.reshape(shape), MESH_AXES, axis_types=self.mesh.axis_types)
    return dataclasses.replace(self, mesh=mesh, rules=dataclasses.replace(self.rules, expert_matrix=(), parameter=()))

  def spec(self, path: Sequence[Any], shape: Sequence[int]) -> PartitionSpec:
    """How the parameter at `path` is cut; stacked over layers if the path starts with "runs".

    Raises:
      ZedaError: the experts cannot be spread evenly over the devices.
    """
    # Layers are scanned one by one: cutting their axis would gather all of them for each.
    first = 1 if path and path[0] == "runs" else 0
    cut: list[Any] = [None] * len(shape)
    if "experts" in path:
      check_experts(shape[first], self.expert_devices)
      cut[first] = self.rules.experts
      self._cut(cut, shape, range(first + 1, len(shape)), self.rules.expert_matrix)
    elif math.prod(shape[first:]) >= self.rules.replicated_below:
      self._cut(cut, shape, range(first, len(shape)), self.rules.parameter)
    return PartitionSpec(*(axes[0] if axes and len(axes) == 1 else axes for axes in cut))

  def parameter(self, path: Sequence[Any], shape: Sequence[int]) -> NamedSharding:
    """Where a parameter lives; `load_hf(path, sharding=sharding.parameter)` reads it right to there."""
    return NamedSharding(self.mesh, self.spec(path, shape))

  def state(self, tree: Any) -> Any:
    """Where each array of a tree of parameters, optimizer state or training state lives, as a tree alike.

    An array is known by the dictionary keys on its path, so moments and master weights lie beside their parameters.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
      return self.parameter([key.key for key in path if isinstance(key, jax.tree_util.DictKey)], np.shape(leaf))

    return jax.tree_util.tree_map_with_path(of, tree)

  def batch(self, tree: Any) -> Any:
    """Where each array of a batch lives, as a tree alike: its rows over all devices.

    Raises:
      ZedaError: the rows cannot be shared out evenly.
    """

    def of(leaf: Any) -> NamedSharding:
      rows = np.shape(leaf)[0]
      if rows % self.num_devices:
        sizes = " x ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        raise ZedaError(
          f"A batch of {rows} rows cannot be shared out evenly over the {self.num_devices} devices of the mesh "
          f"({sizes}): make the number of rows a multiple of {self.num_devices}."
        )
      return NamedSharding(self.mesh, PartitionSpec(self.rules.tokens))

    return jax.tree.map(of, tree)

  def keep_rows(self, x: Float[Array, "B *rest"]) -> Float[Array, "B *rest"]:
    """`x`, with its rows shared out over all devices where they divide evenly (one prompt may have too few)."""
    if x.shape[0] % self.num_devices:
      return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(self.rules.tokens)))

  def on_rows(
    self, function: Callable[..., Array], x: Float[Array, "B *rest"] | Int[Array, "B *rest"], *matrices: Array
  ) -> Float[Array, "B *out"]:
    """function(x, *matrices), each device with its own rows of `x` and the whole matrices, gathered for this.

    For matrices that are held as `spec` cuts parameters, and functions of one row each. Where the rows do not divide
    evenly, or are so few that sending them would take fewer bytes than the matrices, the compiler decides.
    """
    tokens = math.prod(x.shape[:-1]) if jnp.issubdtype(x.dtype, jnp.floating) else x.size
    few = tokens < max(side for matrix in matrices for side in matrix.shape)
    if few or x.shape[0] % self.num_devices:
      return function(x, *matrices)
    rows, specs = PartitionSpec(self.rules.tokens), [self.spec((), matrix.shape) for matrix in matrices]

    def on_device(x: Array, *parts: Array) -> Array:
      return function(x, *(gather(part, spec) for part, spec in zip(parts, specs, strict=True)))

    return jax.shard_map(on_device, mesh=self.mesh, in_specs=(rows, *specs), out_specs=rows)(x, *matrices)

  def _ways(self, axes: Iterable[str]) -> int:
    return math.prod(self.mesh.shape[name] for name in axes)

  def _cut(self, cut: list[Any], shape: Sequence[int], places: Sequence[int], axes: tuple[str, ...]) -> None:
    """Cuts one of the sides at `places` along all of `axes`, or two sides along one axis each.

    Parts of whole tiles come first, and among them parts of rows, which alone are reduce-scattered without a copy.
    Where no cut gives whole tiles, the longest side that divides is cut along all axes, or along one of them.
    """
    if self._ways(axes) == 1:
      return
    if len(places) > 1:
      rows, columns = places[-2], places[-1]
      for chosen in ({rows: axes}, {columns: axes}, {rows: axes[:1], columns: axes[1:]}):
        if all(self._whole_tiles(shape, place, names) for place, names in chosen.items()):
          for place, names in chosen.items():
            cut[place] = names or None
          return
    longest_first = sorted(places, key=lambda place: -shape[place])
    for choice in (axes, *((name,) for name in axes if len(axes) > 1)):
      for place in longest_first:
        if shape[place] % self._ways(choice) == 0:
          cut[place] = choice
          return

  def _whole_tiles(self, shape: Sequence[int], place: int, axes: tuple[str, ...]) -> bool:
    return shape[place] % (self._ways(axes) * _TILE[place - len(shape)]) == 0


def _devices(mesh: Any) -> np.ndarray | None:
  return None if isinstance(mesh, AbstractMesh) else mesh.devices


def gather(part: Array, spec: PartitionSpec) -> Array:
  """The whole of an array that is cut by `spec`, under shard_map. The transpose sums gradients and cuts them again."""
  for place, axes in enumerate(spec):
    # One axis of the mesh after the other, the inner one first: as many bytes as at once, but at once the TPU compiler
    # makes an all-reduce of a small array's gather over the whole mesh, which sends twice as many.
    for axis in reversed(_names(axes)):
      # A TPU holds the last two sides of an array in tiles. Parts of broken tiles are put together afterwards.
      broken = place == part.ndim - 2 and part.shape[place] % _TILE[0]
      part = jax.lax.all_gather(part, axis, axis=place, tiled=not broken)
      if broken:
        part = part.reshape(*part.shape[:place], -1, part.shape[-1])
  return part


def sum_and_cut(x: Array, spec: PartitionSpec) -> Array:
  """The transpose of `gather`: each device's part of the sum of all devices' arrays, under shard_map."""
  for place, axes in enumerate(spec):
    for axis in _names(axes):
      x = jax.lax.psum_scatter(x, axis, scatter_dimension=place, tiled=True)
  return x


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else axes


def check_experts(num_experts: int, devices: int) -> None:
  """Raises ZedaError unless the experts can be spread evenly over so many devices."""
  if num_experts % devices:
    fitting = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
    raise ZedaError(
      f"{num_experts} experts cannot be spread evenly over expert={devices} devices: choose one of {fitting}."
    )


def mesh_sizes(count: int, data: int = -1, expert: int = 1, num_experts: int | None = None) -> tuple[int, int]:
  """Devices along "data" and "expert" of a mesh of `count`; arguments and errors are those of `make_mesh`."""
  asked = f"data={data} x expert={expert}"
  sizes = {"data": data, "expert": expert}
  if data == expert == -1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise ZedaError(f"The mesh is {asked}; expected two positive numbers whose product is {count}, or -1 for one.")
  known = math.prod(size for size in sizes.values() if size != -1)
  if count % known or (-1 not in sizes.values() and known != count):
    raise ZedaError(
      f"A mesh of {asked} does not fit the {count} devices that there are: choose two numbers whose product is "
      f"{count}, or -1 for one of them."
    )
  first, second = (count // known if size == -1 else size for size in sizes.values())
  if num_experts is not None:
    check_experts(num_experts, second)
  return first, second


def make_mesh(
  data: int = -1, expert: int = 1, *, num_experts: int | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh of data x expert devices, neighbours along "expert", where the exchange is.

  Args:
    data: devices along "data"; -1 takes what `expert` leaves.
    expert: devices over which the experts are spread; -1 takes what `data` leaves.
    num_experts: of the model, to check that they can be spread.
    devices: None means all there are, of all processes.

  Raises:
    ZedaError: the sizes do not give the number of devices, or do not divide the experts.
  """
  devices = jax.devices() if devices is None else list(devices)
  shape = mesh_sizes(len(devices), data, expert, num_experts)
  # A TPU slice is a torus: where the sizes are no products of its sides, a side is split.
  placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 2)
