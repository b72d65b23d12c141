"""What the public functions do before any backend runs: checks, the choice of a backend, and the simple backends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.grouped_matmul.contract import EXACT, Contract, inputs, oracle
from zeda_jax.errors import ZedaError
from zeda_jax.ops.grouped_matmul import BACKENDS, grouped_matmul, grouped_swiglu


class TestDefault(Contract):
  backend = None  # chosen by the platform


class TestReference(Contract):
  backend = "reference"


class TestRaggedDot(Contract):
  backend = "ragged_dot"


def test_the_default_backend_is_tiled_on_this_platform():
  lhs, rhs, grad = inputs((17, 3, 2, 3))
  sizes = jnp.array([5, 5, 5])
  out = grouped_matmul(lhs, rhs, sizes)
  np.testing.assert_allclose(out, oracle(lhs, rhs, [5, 5, 5], grad)[0], **EXACT)
  program = jax.jit(grouped_matmul).lower(lhs, rhs, sizes).as_text()
  tiled = jax.jit(lambda *a: grouped_matmul(*a, backend="tiled")).lower(lhs, rhs, sizes).as_text()
  assert program.count("stablehlo.while") == tiled.count("stablehlo.while") > 0
  assert "custom_call" not in program


@pytest.mark.parametrize(
  ("shapes", "types", "words"),
  [
    (((2, 3, 4), (2, 3, 4), (2,)), "ffi", r"expected lhs \[M, K\].*found \(2, 3, 4\)"),
    (((8, 3), (2, 4, 4), (2,)), "ffi", r"lhs \(8, 3\) has K = 3 and rhs \(2, 4, 4\) has K = 4"),
    (((8, 3), (2, 3, 4), (3,)), "ffi", "group_sizes has 3 entries; expected one per matrix .* which are 2"),
    (((8, 3), (2, 3, 4), (2,)), "fff", "group_sizes is float32; expected an integer type"),
    (((8, 3), (2, 3, 4), (2,)), "bfi", "lhs is bfloat16 and rhs is float32; expected one floating type"),
    (((8, 3), (2, 3, 4), (2,)), "iii", "lhs is int32 and rhs is int32; expected one floating type"),
  ],
)
def test_arguments_that_do_not_fit(shapes, types, words):
  kinds = {"f": jnp.float32, "b": jnp.bfloat16, "i": jnp.int32}
  arguments = [jnp.zeros(shape, kinds[kind]) for shape, kind in zip(shapes, types, strict=True)]
  with pytest.raises(ZedaError, match=words):
    grouped_matmul(*arguments)
  with pytest.raises(ZedaError, match=words.replace("rhs", "(rhs|gate_up)")):
    grouped_swiglu(*arguments)


def test_swiglu_of_an_odd_width():
  with pytest.raises(ZedaError, match=r"gate_up is \(2, 3, 5\); expected an even last axis"):
    grouped_swiglu(jnp.zeros((8, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(2, jnp.int32))


def test_an_unknown_backend():
  lhs, rhs, _ = inputs((17, 3, 2, 3))
  with pytest.raises(ZedaError, match=r"backend is .cuda.; expected None or one of .*tiled"):
    grouped_matmul(lhs, rhs, jnp.zeros(3, jnp.int32), backend="cuda")


@pytest.mark.parametrize("backend", [name for name, backend in BACKENDS.items() if backend.platforms])
def test_a_backend_of_another_platform_names_those_that_run_here(backend):
  lhs, rhs, _ = inputs((17, 3, 2, 3))
  runs_on = BACKENDS[backend].platforms[0]
  words = f"backend '{backend}' runs on {runs_on}, and this program is compiled for cpu; .* tiled, ragged_dot"
  with pytest.raises(ZedaError, match=words):
    grouped_matmul(lhs, rhs, jnp.zeros(3, jnp.int32), backend=backend)
