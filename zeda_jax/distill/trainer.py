"""The training loop: resumable, stoppable, and blind to what a step does."""

import concurrent.futures
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from zeda_jax.checkpoint.orbax import CheckpointStore
from zeda_jax.distill.metrics import MetricWriter
from zeda_jax.distributed import Vote
from zeda_jax.errors import ZedaError

State = TypeVar("State")
# Scalars fetched after every step; the others are fetched only for the rows that are written.
CHECKED = ("loss", "grad_norm")
TOKENS = "tokens"


class Batches(Protocol):
  """A grain DatasetIterator, or anything that can tell and set its position."""

  def __next__(self) -> Any: ...
  def get_state(self) -> Any: ...
  def set_state(self, state: Any, /) -> None: ...


class StoppedEarly(Exception):
  """Training was asked to stop and has saved; the command line prints the message (where, how to go on) and exits 0."""

  def __init__(self, message: str, step: int = 0):
    super().__init__(message)
    self.step = step


class StopSignal:
  """Context in which SIGTERM and the first SIGINT (Ctrl-C) only set `requested`; a second Ctrl-C interrupts.

  Any number of SIGTERM changes nothing more, so that it cannot break a save. With several processes each sees only its
  own signals: ask `distributed.any_process(stop.requested)`, so that all stop at the same place. Outside the main
  thread nothing is changed. Contexts nest: a request reaches the outer ones too, for the inner one may be about to end
  anyway.
  """

  def __init__(self) -> None:
    self.requested = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
      self.requested = any(outer.requested for outer in map(self._outer, self._previous) if outer)
    return self

  def __exit__(self, *exc: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _request(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and self.requested:
      raise KeyboardInterrupt
    if outer := self._outer(number):
      outer.requested = True
    self.requested = True

  def _outer(self, number: int) -> "StopSignal | None":
    handler = getattr(self._previous.get(number), "__self__", None)
    return handler if isinstance(handler, StopSignal) else None


def run_training(
  *,
  state: State,
  step_fn: Callable[[State, Any], tuple[State, Mapping[str, Any]]],
  batches: Batches,
  num_steps: int,
  store: CheckpointStore,
  save_every: int,
  writer: MetricWriter,
  log_every: int = 1,
  make_batch: Callable[[State, Any, int], Any] | None = None,
  snapshot: Callable[[State], State] | None = None,
  prepare: Callable[[Any], Any] | None = None,
  metadata: Mapping[str, Any] | None = None,
  abort_on_nonfinite: bool = True,
  label: str = "training",
) -> State:
  """Runs `step_fn` until `num_steps` steps are done, going on from the newest checkpoint in `store`.

  With a deterministic step the result does not depend on how often the run was killed and resumed (but see `snapshot`):
  state and data position are saved together, and metrics are written before the checkpoint that contains their step.

  Args:
    state: initial train state, its rng key included. Where `store` has a checkpoint only shapes, dtypes and shardings
      are read from it, so jax.ShapeDtypeStruct leaves do.
    step_fn: pure and jitted, may donate its state; the metrics are device scalars, vectors [L] or nested dictionaries
      of them. "loss" and "grad_norm" are watched for NaN and Inf, "tokens" is counted for tokens_per_second. It need
      not guard its update: a state is saved only after the metrics of its last step and all its arrays were found
      finite.
    batches: iterator whose position is saved with the state; it is at its beginning when nothing is restored.
    num_steps: steps of the whole run.
    save_every: steps between checkpoints; the last step is always saved.
    log_every: steps between metric rows; step 1 and the last one are always written. Values are those of that step,
      step_seconds and tokens_per_second are wall-clock means since the row before (first row: compilation included).
    make_batch: (state, raw batch, number of finished steps) -> batch, for batches that come from the student itself;
      called only with a state whose last step was found finite.
    snapshot: a copy of what `make_batch` reads of a state. Where it is given, batches are made one step ahead: the next
      one by the state before the step that is being computed meanwhile. The first batch of a run, and the first after
      it went on from a checkpoint, is made by the newest state.
    prepare: batch -> batch, placement on devices; runs while the previous step is still computing.
    metadata: small JSON-able dictionary stored with each checkpoint.
    abort_on_nonfinite: whether NaN or Inf stops the run.
    label: what this training is called in messages.

  Returns:
    The state after `num_steps` steps, which is also saved.

  Raises:
    StoppedEarly: SIGTERM (a preemption) or Ctrl-C in any of the processes; everything is saved, by all at one step.
    ZedaError: NaN or Inf appeared, or the checkpoint does not fit this run.
  """
  step = store.latest_step() or 0
  if step > num_steps:
    raise ZedaError(
      f"{store.directory} has a checkpoint of step {step}, but {label} is configured for {num_steps} steps: raise the "
      "number of steps or use another output directory."
    )
  if step:
    restored = store.restore(state)
    state = restored.state
    batches.set_state(restored.data_state)
  log = _Log(store, writer, step, num_steps, log_every, abort_on_nonfinite, label)
  vote = Vote()
  writer.start(step, num_steps)

  def take() -> Any:
    raw = next(batches, None)
    if raw is None:
      raise ZedaError(f"the data of {label} ended after {step} of {num_steps} steps: lower the number of steps.")
    return raw

  ahead: Any = None  # the next batch, where it is made already
  with StopSignal() as stop:
    try:
      while step < num_steps:
        if ahead is not None:
          batch, ahead = ahead, None
        elif make_batch is None:
          batch = take()
        else:
          raw = take()
          log.flush()
          batch = make_batch(state, raw, step)
        position = batches.get_state()
        if prepare is not None:
          batch = prepare(batch)
        before = None if snapshot is None or step + 1 == num_steps else snapshot(state)
        state, metrics = step_fn(state, batch)
        step += 1
        log.add(step, metrics)
        # With several processes the answer is a step old, so that the devices need not wait; but before a batch is
        # made, which takes long, they do so anyway.
        wait = make_batch is not None and snapshot is None
        stopping = vote(stop.requested, wait=wait) and step < num_steps
        if before is not None and not stopping:  # while the devices compute the step
          assert make_batch is not None
          ahead = make_batch(before, take(), step)
        if step % save_every == 0 or step == num_steps or stopping:
          log.flush()
          if abort_on_nonfinite:
            log.check_state(step, state)
          store.save(step, state, position, metadata)
        if stopping:
          store.wait()
          raise StoppedEarly(
            f"{label} stopped after step {step} of {num_steps}, saved in {store.step_directory(step)}; run the same "
            "command again to go on.",
            step,
          )
    finally:
      log.close()
      writer.close()
      store.wait()  # also when interrupted: a checkpoint being written is finished
  return state


class _Log:
  """Reads the metrics of a step while the next one runs, checks them and writes rows."""

  def __init__(
    self, store: CheckpointStore, writer: MetricWriter, start: int, num_steps: int, every: int, abort: bool, label: str
  ):
    self._store, self._writer, self._label, self._abort = store, writer, label, abort
    self._num_steps, self._every = num_steps, every
    self._pending: tuple[int, Mapping[str, Any], concurrent.futures.Future[tuple[dict[str, Any], float]]] | None = None
    self._reader = concurrent.futures.ThreadPoolExecutor(1)  # sees when a step ends while the loop prepares the next
    self._row_step, self._row_time, self._tokens = start, time.perf_counter(), 0
    self._steady: tuple[int, float] | None = None  # after the first step, which compiles: for the time left

  def add(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Takes the metrics of the step just dispatched and handles those of the step before it."""
    self.flush()
    watched = {name: metrics[name] for name in (*CHECKED, TOKENS) if name in metrics}
    self._pending = (step, metrics, self._reader.submit(lambda: (jax.device_get(watched), time.perf_counter())))

  def close(self) -> None:
    self._reader.shutdown()

  def flush(self) -> None:
    if self._pending is None:
      return
    (step, metrics, watched), self._pending = self._pending, None
    scalars, now = watched.result()
    if self._abort:
      for name in CHECKED:
        if name in scalars and not np.isfinite(scalars[name]):
          raise self._nonfinite(step, name, float(scalars[name]))
    self._tokens += int(scalars.get(TOKENS, 0))
    self._steady = self._steady or (step, now)
    if step % self._every == 0 or step in (1, self._num_steps):
      self._write(step, jax.device_get(metrics), now)

  def _write(self, step: int, metrics: Mapping[str, Any], now: float) -> None:
    seconds = now - self._row_time
    timing = {"step_seconds": seconds / max(step - self._row_step, 1)}
    if self._tokens:
      timing["tokens_per_second"] = self._tokens / seconds
    assert self._steady is not None
    steps = step - self._steady[0]
    left = (now - self._steady[1]) / steps * (self._num_steps - step) if steps else None
    self._writer.write(step, {**metrics, **timing}, left)
    self._row_step, self._row_time, self._tokens = step, now, 0

  def check_state(self, step: int, state: Any) -> None:
    """Raises if an array of the state that is about to be saved has a NaN or Inf."""
    named = {
      jax.tree_util.keystr(path, simple=True, separator="."): leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
      if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    bad = [name for name, fine in jax.device_get(_all_finite(named)).items() if not fine]
    if bad:
      raise self._nonfinite(step, bad[0], None)

  def _nonfinite(self, step: int, name: str, value: float | None) -> ZedaError:
    self._store.wait()
    good = self._store.latest_step()
    kept = f"the last good checkpoint is {self._store.step_directory(good)}" if good else "no checkpoint was saved yet"
    found = "not finite" if value is None else str(value)
    return ZedaError(
      f"{name} became {found} in step {step} of {self._label}; {kept}: lower the learning rate or the "
      f"gradient clipping norm and run the same command again{' to go on from it' if good else ''}."
    )


@jax.jit
def _all_finite(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: jnp.isfinite(array).all() for name, array in arrays.items()}
