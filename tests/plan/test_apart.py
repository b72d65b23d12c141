"""The compiler in a process of its own: what comes of a crash, of an error, and of an answer."""

import pytest

from zeda_jax.errors import ZedaError
from zeda_jax.plan import apart
from zeda_jax.plan.apart import CompilerCrash, compile_apart, crash_note, crash_reason
from zeda_jax.plan.program import Sent
from zeda_jax.plan.worker import Job


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
  monkeypatch.setattr(apart, "_WORKER", "tests.plan.crashing_worker")


def compiled(quickly, in_full, devices=16):
  does = {"quickly": quickly, "in full": in_full}
  return compile_apart(Job({}, does, "v5e:4x4", "sft", 1024, "step", False, False), devices)


def test_a_crash_is_tried_again_in_full(capfd):
  found = compiled("crash", "works")
  assert found.traffic == [Sent("all-gather", 4, 8.0)] and found.temporaries == 3
  assert "stack dump" not in "".join(capfd.readouterr())


def test_a_second_crash_is_told_in_a_sentence():
  with pytest.raises(CompilerCrash) as crash:
    compiled("crash", "crash")
  assert crash_note(crash.value) == (
    "The TPU compiler crashed on this plan (Check failed: reduction_loop_bound == 1 (4 vs. 1)): these numbers are an "
    "estimate from shapes."
  )


def test_what_works_is_compiled_once():
  assert compiled("works", "crash").needed == 0
  assert compiled("crash", "refused", devices=4).traffic is None  # too few devices to be quick
  assert compiled("refused", "crash").needed == 1e12


def test_errors_are_no_crashes():
  with pytest.raises(ZedaError, match=r"^a sentence\.$"):
    compiled("error", "works")
  with pytest.raises(ZedaError, match="cannot be compiled: ValueError: no such thing"):
    compiled("raise", "works")


def test_reasons():
  assert crash_reason("", 9) == "killed, as where memory runs out"
  assert crash_reason("nothing to see", 11) == "signal 11"
