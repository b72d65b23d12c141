"""The whole model's benchmark: the engine's forward passes, static against dynamic, beside what FLOPs promise."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from zeda_jax.analysis.flops import theoretical_speedup
from zeda_jax.bench.machine import header, this_machine
from zeda_jax.bench.model_options import (
  LENGTHS,
  PAPER,
  PAPER_MODEL,
  PAPER_RATIO,
  ModelOptions,
  find_geometry,
  with_layers,
)
from zeda_jax.bench.model_table import ModelReport, ModelRow
from zeda_jax.bench.model_weights import Twin, check_memory, checkpoint_twins, random_twins
from zeda_jax.bench.timing import Timing, measure
from zeda_jax.config import ModelConfig
from zeda_jax.errors import ZedaError
from zeda_jax.models.paged_cache import PagedCache, Pages, init_pages, page_bytes
from zeda_jax.models.params import Params, merge_model
from zeda_jax.plan.models import MODELS
from zeda_jax.rollout.decoding import Slots, decode
from zeda_jax.rollout.pages import pages_for
from zeda_jax.rollout.sampling import RowSampling

_CPU: dict[str, Any] = {"layers": 1, "dtype": "float32", "repeats": 3, "lengths": (1024, 2048, 4096, 8192)}
_ACCELERATOR: dict[str, Any] = {"dtype": "bfloat16", "repeats": 10, "lengths": LENGTHS}
PAGE_SIZE = 64  # the engine's
_BISECTIONS = 14
_BIASES = 30.0  # beyond every logit
_PROBE = 512  # tokens for which the bias is looked for
_SMALL = 512  # width below which only the program is tried out


def resolved(options: ModelOptions) -> ModelOptions:
  """The options with the platform's defaults in place of None; a checkpoint has all of its layers."""
  defaults = dict(_CPU if jax.default_backend() == "cpu" else _ACCELERATOR)
  if options.model not in MODELS:
    defaults.pop("layers", None)
  changes = {name: value for name, value in defaults.items() if getattr(options, name) is None}
  return dataclasses.replace(options, **changes)


def bench_model(options: ModelOptions, say: Callable[[str], None] = lambda text: None) -> ModelReport:
  """Measures what `options` asks for.

  Args:
    options: see there.
    say: told what is being measured.

  Raises:
    ZedaError: an unknown model, lengths beyond its context, or too little memory.
  """
  options = resolved(options)
  name, config = find_geometry(options.model)
  lengths, dtype = tuple(options.lengths or ()), str(options.dtype)
  if max(lengths) + options.steps > config.max_position_embeddings:
    raise ZedaError(
      f"lengths has {max(lengths)}, and {options.steps} steps more exceed the model's context of "
      f"{config.max_position_embeddings}."
    )
  on_cpu = jax.default_backend() == "cpu"
  say(f"{name}: weights of {options.layers or config.num_layers} of {config.num_layers} layers")
  if options.model not in MODELS:
    static, dynamic = checkpoint_twins(options.model, options.layers, dtype, unstack=on_cpu)
  else:  # layers apart on a CPU, as the engine has them there
    static, dynamic = random_twins(with_layers(config, options.layers).replace(dtype=dtype, stack_layers=not on_cpu))
  bench = _Bench(static, dynamic, options)
  bias = bench.find_bias()
  rows = []
  for stage in options.stages:
    for length in lengths:
      say(f"{stage} of {length} tokens")
      rows.append(bench.row(stage, length, bias))
  if options.model == PAPER_MODEL and options.ratio == PAPER_RATIO:
    rows = [row._replace(paper=PAPER.get((row.stage, row.length))) for row in rows]
  machine = this_machine(dtype, small=config.hidden_size < _SMALL)
  return ModelReport(
    f"zeda bench model: {name}, {dynamic.config.num_layers} of {config.num_layers} layers",
    (header(machine, dtype), _sizes_note(dynamic.config, config, bias), _how_note(options)),
    tuple(rows),
  )


def _sizes_note(config: ModelConfig, whole: ModelConfig, bias: float) -> str:
  picks = f"N = {config.num_experts}, K = {config.num_experts_per_tok}, N_Z = {config.num_zero_experts}"
  text = f"{picks}; zero_expert_bias {bias:.3f}"
  if config.vocab_size != whole.vocab_size:
    text += (
      f"; vocabulary {whole.vocab_size} → {config.vocab_size}, so that the head takes the share of the time that it "
      "has in the whole model"
    )
  return text


def _how_note(options: ModelOptions) -> str:
  sequences = f"{options.slots} sequence{'s' if options.slots > 1 else ''} decoded together"
  return (
    f"the engine's prefill, of one sequence of l tokens, and its decode: {sequences}, {options.steps} steps at half of "
    "l, where a step takes the mean of l steps, sampling at temperature 1; static and dynamic in turns, "
    f"{options.repeats} rounds or more; speed-ups are of medians"
  )


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="pages")
def _prefill(
  graphdef: nnx.GraphDef,
  params: Params,
  pages: Pages,
  tokens: Int[Array, "1 T"],
  lengths: Int[Array, " 1"],
  table: Int[Array, "1 W"],
  zero_expert_bias: Float[Array, " 1"],
) -> tuple[Pages, tuple[Int[Array, ""], Float[Array, " H"]]]:
  """The engine's prefill of one prompt; but the last layer's output is wanted, too.

  The engine keeps nothing that follows from the last layer's experts, so that XLA leaves them out where it can: of one
  layer, none would be left to measure.
  """
  model = merge_model(graphdef, params)
  index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  live = index < lengths[:, None]
  bias = jnp.repeat(zero_expert_bias, tokens.shape[1])[:, None]
  out = model.hidden(tokens, live.astype(jnp.int32), index, bias, cache=PagedCache(pages, table, fresh=True))
  assert isinstance(out.cache, PagedCache)
  zero = (out.picks >= model.config.num_experts) & live[:, :, None]
  return out.cache.pages, (zero.sum(), out.hidden.sum(axis=(0, 1)))


@dataclasses.dataclass
class _Bench:
  """The two models and the programs that were compiled for them."""

  static: Twin
  dynamic: Twin
  options: ModelOptions
  programs: dict[tuple[Any, ...], Any] = dataclasses.field(default_factory=dict)

  def find_bias(self) -> float:
    """The zero_expert_bias at which random tokens have about the share of zero picks that is asked for."""
    low, high = -_BIASES, _BIASES
    length = min(_PROBE, self.dynamic.config.max_position_embeddings)
    call = self.prefill(self.dynamic, length, 0.0)
    for _ in range(_BISECTIONS):
      bias = (low + high) / 2
      call.change(_prompt(self.dynamic.config, length, bias))
      low, high = (bias, high) if call.zero_ratio() < self.options.ratio else (low, bias)
    return (low + high) / 2

  def row(self, stage: str, length: int, bias: float) -> ModelRow:
    """Static and dynamic in interleaved rounds; seconds of one prefill, or of one decode step."""
    make = self.prefill if stage == "prefill" else self.decode
    static, dynamic = make(self.static, length, 0.0), make(self.dynamic, length, bias)
    static.zero_ratio()  # once before it is timed
    ratio = dynamic.zero_ratio()
    times = measure({"static": static.again, "dynamic": dynamic.again}, self.options.repeats or 1)
    per = 1 if stage == "prefill" else self.options.steps
    seconds = [Timing(t.median / per, t.minimum / per) for t in (times["static"], times["dynamic"])]
    theory = theoretical_speedup(self.dynamic.config, length, ratio, stage)
    return ModelRow(stage, length, ratio, seconds[0], seconds[1], theory)

  def prefill(self, twin: Twin, length: int, bias: float) -> "_Call":
    pages, arguments = _pages(twin.config, length, 1), _prompt(twin.config, length, bias)
    run = self._program(_prefill, twin, pages, arguments)
    picks = _picks(twin.config, length)
    return _Call(run, twin.params, pages, arguments, lambda found: int(found[0]) / picks)

  def decode(self, twin: Twin, length: int, bias: float) -> "_Call":
    """Steps in the middle of the `length` tokens: the time of a step is linear in what the cache holds."""
    config, slots, steps = twin.config, self.options.slots, self.options.steps
    longest = max(self.options.lengths or (length,))
    pages = _pages(config, longest // 2 + steps, slots)  # one program for all lengths
    arguments = (_slots(config, slots, max(length - steps, 0) // 2, steps, bias, pages[0].shape[1]), np.int32(steps))
    run = self._program(decode, twin, pages, arguments, size=steps, with_picks=False)
    picks = _picks(config, slots * steps)
    return _Call(run, twin.params, pages, arguments, lambda chunk: int(chunk.zero_picks.sum()) / picks)

  def _program(self, function: Any, twin: Twin, pages: Pages, arguments: tuple[Any, ...], **static: Any) -> Any:
    """One of the engine's functions, compiled for these shapes.

    Raises:
      ZedaError: it needs more memory than there is.
    """
    shapes = tuple(x.shape for x in jax.tree.leaves((pages, arguments)))
    key = function, twin.config.num_zero_experts, shapes
    if key not in self.programs:
      compiled = function.lower(twin.graphdef, twin.params, pages, *arguments, **static).compile()
      memory = compiled.memory_analysis()
      if memory is not None:
        check_memory(memory.temp_size_in_bytes, f"{twin.config.num_layers} layers' activations")
      self.programs[key] = compiled
    return self.programs[key]


@dataclasses.dataclass
class _Call:
  """A program on one of the models; the pages, which each call donates, are handed on to the next.

  Attributes:
    share: what the program gives beside the pages -> share of zero picks.
  """

  program: Any
  params: Params
  pages: Pages
  arguments: tuple[Any, ...]
  share: Callable[[Any], float]

  def again(self) -> Any:
    self.pages, found = self.program(self.params, self.pages, *self.arguments)
    return found

  def zero_ratio(self) -> float:
    return self.share(self.again())

  def change(self, arguments: tuple[Any, ...]) -> None:
    self.arguments = arguments


def _picks(config: ModelConfig, tokens: int) -> int:
  return tokens * sum(config.moe_layers) * config.num_experts_per_tok


def _pages(config: ModelConfig, length: int, sequences: int) -> Pages:
  pages = sequences * pages_for(length, PAGE_SIZE)
  check_memory(pages * page_bytes(config, PAGE_SIZE), f"{sequences} sequences' keys and values")
  return init_pages(config, pages, PAGE_SIZE)


def _prompt(config: ModelConfig, length: int, bias: float) -> tuple[Any, ...]:
  """The arguments of `prefill` for one sequence of random tokens."""
  tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length), dtype=np.int32)
  table = np.arange(pages_for(length, PAGE_SIZE), dtype=np.int32)[None]
  return tokens, np.full(1, length, np.int32), table, np.full(1, bias, np.float32)


def _slots(config: ModelConfig, count: int, cached: int, steps: int, bias: float, num_pages: int) -> Slots:
  """`count` sequences of `cached` tokens which shall get `steps` more."""

  def column(value: float, dtype: Any) -> Any:
    return np.full(count, value, dtype)

  numbers: Any = np.random.default_rng(0).integers(0, config.vocab_size, count, dtype=np.int32)
  streams: Any = np.arange(count, dtype=np.uint32)
  table: Any = np.arange(num_pages, dtype=np.int32).reshape(count, -1)
  return Slots(
    tokens=numbers,
    positions=column(cached, np.int32),
    remaining=column(steps, np.int32),
    sampled=column(0, np.int32),
    seeds=column(0, np.uint32),
    streams=streams,
    sampling=RowSampling(
      column(1.0, np.float32), column(0, np.int32), column(1.0, np.float32), column(0.0, np.float32)
    ),
    stop_ids=column(-1, np.int32)[:, None],
    zero_expert_bias=column(bias, np.float32),
    table=table,
  )
