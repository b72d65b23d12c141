"""One operation with different code on different platforms, chosen when a program is lowered.

jax.lax.platform_dependent does the same, but traces the code of every platform each time, and kernels take long to
trace. Here only the platform's own is traced, and a platform without code gets a sentence, not a stack trace of a
kernel compiler.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import sequential_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir

from zeda_jax.errors import ZedaError

# The platform is known only when a program is lowered (it may be compiled ahead of time for another machine), so the
# choice is an operation of the program.
_by_platform = Primitive("by_platform")
_by_platform.multiple_results = True


@_by_platform.def_abstract_eval
def _abstract_eval(first, *_, results: tuple[tuple[tuple[int, ...], Any], ...], **__):
  def replicated(shape, dtype):
    sharding = jax.sharding.NamedSharding(first.sharding.mesh, jax.sharding.PartitionSpec(*[None] * len(shape)))
    return jax.core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=first.manual_axis_type)

  return [replicated(*result) for result in results]


@_by_platform.def_impl
def _run(*operands, **params):
  return jax.jit(lambda *arrays: _by_platform.bind(*arrays, **params))(*operands)


def _lower(context: mlir.LoweringRuleContext, *operands: Any, functions, default, refusal: str, **_) -> Any:
  platforms = context.module_context.platforms
  chosen = {dict(functions).get(platform, default) for platform in platforms}
  if len(chosen) > 1:
    raise ZedaError(f"The program is lowered for {' and '.join(platforms)} at once; name one platform.")
  (function,) = chosen
  if function is None:
    raise ZedaError(refusal.format(platform=platforms[0]))
  flat = lambda *arrays: jax.tree.leaves(function(*arrays))
  return mlir.lower_fun(flat, multiple_results=True)(context, *operands)


mlir.register_lowering(_by_platform, _lower)


def by_platform(
  *operands: jax.Array,
  result: Any,
  functions: dict[str, Callable[..., Any]],
  default: Callable[..., Any] | None,
  refusal: str = "",
) -> Any:
  """functions[platform](*operands), or default(*operands) on a platform that `functions` does not name.

  Args:
    operands: arrays that vary over the same mesh axes.
    result: what each of the functions returns: a jax.ShapeDtypeStruct, or a tree of them.
    functions: by the name of JAX's platforms: "cpu", "cuda", "tpu", ...
    default: for the others; None raises there, when the program is lowered.
    refusal: what that ZedaError says; {platform} in it names the platform.
  """
  leaves, structure = jax.tree.flatten(result)
  params = {"functions": tuple(functions.items()), "default": default, "refusal": refusal}
  out = _by_platform.bind(*operands, results=tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves), **params)
  return jax.tree.unflatten(structure, out)


def by_backend(
  *operands: jax.Array,
  name: str | None,
  platforms: tuple[str, ...] | None,
  of: Callable[[str], Callable[..., Any]],
  defaults: dict[str, str],
  elsewhere: str,
  result: Any,
  what: str,
  anywhere: str,
) -> Any:
  """of(backend)(*operands), once for each index of a vmapped axis, for the backend `name` or the platform's best.

  Args:
    operands: arrays that vary over the same mesh axes.
    name: of the backend; None leaves the choice to the platform that the program is lowered for.
    platforms: where the named backend runs; None means everywhere.
    of: the function of a backend.
    defaults: the best backend of a platform.
    elsewhere: the backend of the platforms that `defaults` does not name.
    result: a jax.ShapeDtypeStruct or a tree of them.
    what: the public function, for the ZedaError on a platform where the named backend does not run.
    anywhere: the names of those that run there, for the same.
  """
  if name is not None and platforms is None:
    run = of(name)
  else:
    run = functools.partial(
      by_platform,
      result=result,
      functions={platform: of(name or defaults[platform]) for platform in platforms or defaults},
      default=of(elsewhere) if name is None else None,
      refusal=f"{what}: backend {name!r} runs on {' or '.join(platforms or ())}, and this program is compiled for "
      f"{{platform}}; leave backend=None, or name one of those that run anywhere: {anywhere}.",
    )
  # A vmapped kernel is a loop of kernels: batching their dynamic loops would run each as often as the longest.
  return sequential_vmap(run)(*operands)
