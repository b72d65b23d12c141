"""The TPU compiler on a machine without a TPU: where it is, what it must be told, and what it says of a program."""

import importlib.util
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from zeda_jax.errors import ZedaError

if TYPE_CHECKING:  # both import JAX, which must find the environment below
  from zeda_jax.plan.program import Sent
  from zeda_jax.sharding import Sharding

# What libtpu asks the machine for when there is no TPU in it. Set before JAX is imported.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_ENABLE_COMPILATION_CACHE": "0",  # programs for other machines do not belong there
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a lock for chips, which there are none of: programs may be compiled side by side
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_LOG_DIR": "disabled",
  "TPU_MIN_LOG_LEVEL": "3",
}
# Half the time to compile, with the same collectives. On slices of 2 x 2 chips the compiler crashes then when it sums a
# small array and cuts it over all four.
QUICKLY = {"exec_time_optimization_effort": -1.0}
TOO_FEW_TO_BE_QUICK = 4  # devices

_SIZE = r"([\d.]+)([KMGT]?)(?:i?B)?"
_TOO_LARGE = {
  "needed": rf"Used {_SIZE} of [\d.]+[KMGT]?(?:i?B)? hbm",
  "temporaries": rf"required for HLO temporaries \({_SIZE}\) exceeds",
}


class Compiled(NamedTuple):
  """What the compiler says of one device's program.

  Attributes:
    outputs: bytes of results that do not replace arguments.
    temporaries: bytes beside arguments and results.
    needed: bytes in all, where the compiler refused the program and told them; else 0.
    traffic: what it sends; None where the compiler refused it for its memory.
  """

  outputs: float
  temporaries: float
  needed: float
  traffic: "list[Sent] | None"


def find_libtpu() -> bool:
  """Whether libtpu can be imported, after adding <environment>/libtpu to the path if it is there."""
  beside = str(pathlib.Path(sys.prefix) / "libtpu")
  if os.path.isdir(beside) and beside not in sys.path:
    sys.path.append(beside)
  return importlib.util.find_spec("libtpu") is not None


def describe_devices(name: str) -> Sequence[Any]:
  """The devices of a topology, for a mesh to compile for.

  Raises:
    ZedaError: the compiler does not know the topology, or another process holds it.
  """
  from jax.experimental import topologies

  options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
  except Exception as error:  # of many kinds, by version
    message = str(error).splitlines()[0][:300]
    raise ZedaError(
      f"--topology={name}: the TPU compiler does not take it ({message}): choose another slice."
    ) from error


def compile_program(
  function: Any, arguments: tuple[Any, ...], sharding: "Sharding", static: dict[str, Any], quickly: bool
) -> Compiled:
  """Compiles a jitted function for the devices of the mesh. A compiler that crashes takes this process with it: see
  plan/apart.py.

  Args:
    function: jitted.
    arguments: as shapes that lie where they will.
    sharding: whose mesh has the topology's devices.
    static: the function's static arguments.
    quickly: with QUICKLY, where it is known to work.

  Raises:
    ZedaError: the compiler fails for another reason than memory.
  """
  import jax

  from zeda_jax.plan.program import sent

  with jax.set_mesh(sharding.mesh):
    lowered = function.lower(*arguments, **static)
    try:
      compiled = lowered.compile(compiler_options=QUICKLY if quickly else None)
    except jax.errors.JaxRuntimeError as error:
      refused = refusal(str(error))
      if refused is None:
        raise ZedaError(f"The TPU compiler fails: {' '.join(str(error).split())[:400]}") from error
      return refused
  memory = compiled.memory_analysis()
  return Compiled(
    outputs=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
    temporaries=memory.temp_size_in_bytes,
    needed=0,
    traffic=sent(compiled.as_text(), sharding.capacity if sharding.expert_devices > 1 else 1.0),
  )


def refusal(message: str) -> Compiled | None:
  """What the compiler tells of a program that is too large for the memory; None if that was not the reason."""
  for what in ("needed", "temporaries"):
    found = re.search(_TOO_LARGE[what], message)
    if found is not None:
      size = float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")
      return Compiled(outputs=0, traffic=None, **{"needed": 0.0, "temporaries": 0.0, what: size})
  return Compiled(0, 0, 0, None) if "RESOURCE_EXHAUSTED" in message else None
