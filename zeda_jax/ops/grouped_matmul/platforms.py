"""A sentence instead of a compiler's stack trace when a kernel is lowered for a platform that it has no code for."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from zeda_jax.errors import ZedaError

# The platform is known only when a program is lowered (it may be compiled ahead of time for another machine), so the
# check is an operation of the program: it returns its operand and raises while it is lowered.
_only_on = Primitive("only_on")
_only_on.def_abstract_eval(lambda operand, **_: operand)
_only_on.def_impl(lambda operand, **params: jax.jit(lambda x: _only_on.bind(x, **params))(operand))


def _lower(context: mlir.LoweringRuleContext, operand: Any, *, platforms: tuple[str, ...], message: str) -> list[Any]:
  for platform in context.module_context.platforms:
    if platform not in platforms:
      raise ZedaError(message.format(platform=platform))
  return [operand]


mlir.register_lowering(_only_on, _lower)


def refuse_other_platforms(
  function: Callable[..., Any], platforms: tuple[str, ...], message: str
) -> Callable[..., Any]:
  """`function`, raising ZedaError(message) when it is lowered for any other platform; {platform} names that one."""

  def guarded(first: Any, *rest: Any) -> Any:
    return function(_only_on.bind(first, platforms=platforms, message=message), *rest)

  return guarded
