"""The thread that owns the engine: what goes wrong for one job is not the others', and nothing waits for ever."""

import asyncio
import dataclasses
import threading

import pytest

from tests.tiny_models import tiny_model
from zeda_jax.rollout.requests import Request
from zeda_jax.serve.errors import ApiError
from zeda_jax.serve.jobs import Delta, Finished, Job, Prompt
from zeda_jax.serve.scoring import Scorer
from zeda_jax.serve.serving_engine import ServingEngine
from zeda_jax.serve.worker import Worker

LENGTH = 60
SIZES = {"num_slots": 2, "page_size": 8, "max_tokens": 96, "max_length": 96, "chunk_steps": 4}


@pytest.fixture(scope="module")
def model():
  return tiny_model(num_zero_experts=2, moe_layers=(True,))


@pytest.fixture
def worker(model):
  engine = ServingEngine(model, **SIZES)
  worker = Worker(engine, Scorer(model, 96, max_tokens=16))
  worker.start()
  yield worker
  worker.stop()
  assert engine.statistics().pages_used == 0 or worker.has_failed


def decode(tokens):
  return "".join(chr(97 + token % 26) for token in tokens)


def prompt(count=LENGTH, infos=False, top=0, request=True, tokens=(1, 2, 3), **options):
  options = {"temperature": 1.0, "seed": 3, "stop_ids": ()} | options
  sampled = Request(list(tokens), count, **options) if request else None
  return Prompt(list(tokens), sampled, 0.0, (), (), infos or top > 0, False, top)


def job(*prompts, streamed=False, decode=decode):
  closed = asyncio.Event()
  made = Job(list(prompts), streamed, decode, closed.set)
  made.closed = closed
  return made


async def collect(made):
  text, infos, ends = "", [], 0
  async for event in made.events():
    if isinstance(event, Delta):
      text, infos = text + event.text, infos + event.infos
    ends += isinstance(event, Finished)
  assert ends == 1 and made.closed.is_set()
  return text, infos


async def answer(worker, *prompts, **options):
  made = job(*prompts, **options)
  worker.submit(made)
  return await collect(made)


def test_streamed_alternatives(worker):
  """Parts of a stream are those of the whole, and all passes over the text together cost a few times the last."""

  async def run():
    whole = await answer(worker, prompt(top=2))
    before = worker.scored_tokens
    parts = await answer(worker, prompt(top=2), streamed=True)
    return whole, parts, worker.scored_tokens - before

  whole, parts, scored = asyncio.run(run())
  assert whole[0] == parts[0] and [info.id for info in whole[1]] == [info.id for info in parts[1]]
  assert len(parts[1]) == LENGTH and scored < 4 * (LENGTH + 3)
  for mine, theirs in zip(parts[1], whole[1], strict=True):
    assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


def test_a_canceled_job_frees_all(worker):
  async def run():
    alone = await answer(worker, prompt(20))
    gone = job(*[prompt(90) for _ in range(4)], streamed=True)
    worker.submit(gone)
    async for _ in gone.events():
      break
    worker.cancel(gone)
    await asyncio.wait_for(gone.closed.wait(), 30)
    assert (worker.statistics.running, worker.statistics.queue, worker.statistics.pages_used) == (0, 0, 0)
    worker.cancel(gone)  # again: nothing
    assert await answer(worker, prompt(20)) == alone

  asyncio.run(run())


def test_stops_of_responses_that_wait(model):
  """Stop strings end what runs and what was set back for want of pages; the others go on."""
  engine = ServingEngine(model, **SIZES)
  worker = Worker(engine, Scorer(model, 96))
  worker.start()

  async def run():
    whole = (await answer(worker, prompt(80)))[0]
    stop = whole[50:53]
    stopping = dataclasses.replace(prompt(80), stops=(stop,))
    asked = [answer(worker, stopping if i % 2 else prompt(80)) for i in range(6)]
    found = [text for text, _ in await asyncio.gather(*asked)]
    assert found == [whole, whole.split(stop)[0]] * 3

  asyncio.run(run())
  worker.stop()
  assert engine.statistics().preemptions > 0 and engine.statistics().pages_used == 0


def test_the_engine_refuses(worker):
  async def run():
    with pytest.raises(ApiError, match="exceeds the 96 tokens") as error:
      await answer(worker, prompt(20), prompt(200))  # the first one is withdrawn
    assert error.value.status == 400
    await answer(worker, prompt(5))
    assert worker.statistics.running == 0

  asyncio.run(run())


def test_a_text_that_cannot_be_made(worker):
  def fails(tokens):
    raise RuntimeError("on purpose")

  async def run():
    good = asyncio.create_task(answer(worker, prompt(40)))
    with pytest.raises(ApiError, match="could not be made") as error:
      await answer(worker, prompt(40), decode=fails)
    assert error.value.status == 500 and len((await good)[0]) == 40

  asyncio.run(run())


def test_scores_that_cannot_be_made(worker, monkeypatch):
  def fails(*args):
    raise MemoryError("on purpose")

  async def run():
    with monkeypatch.context() as patch:
      patch.setattr(Scorer, "__call__", fails)
      good = asyncio.create_task(answer(worker, prompt(40)))
      with pytest.raises(ApiError, match="could not be scored") as error:
        await answer(worker, prompt(request=False))
      assert error.value.status == 500 and len((await good)[0]) == 40
    made = job(prompt(request=False))
    worker.submit(made)
    (_, end) = [event async for event in made.events()]
    assert end.num_tokens == 0 and end.passes == 3 and 0 < end.zero_ratio < 1

  asyncio.run(run())


def test_a_failed_engine(model):
  engine, failed = ServingEngine(model, **SIZES), threading.Event()
  worker = Worker(engine, Scorer(model, 96), failed.set)

  def fails():
    raise RuntimeError("on purpose")

  async def run():
    engine.step = fails
    worker.start()
    for _ in range(2):  # the second is submitted when the thread has ended
      with pytest.raises(ApiError, match=r"The engine has failed \(RuntimeError\)") as error:
        await answer(worker, prompt(5))
      assert error.value.status == 503
      assert failed.wait(10)

  asyncio.run(run())
  assert worker.has_failed and "RuntimeError" in worker.failure
  worker.stop()


def test_stopping_refuses_what_runs(model):
  worker = Worker(ServingEngine(model, **SIZES), Scorer(model, 96))
  worker.start()

  async def run():
    running, waiting = job(prompt(90), streamed=True), job(*[prompt(90) for _ in range(3)])
    worker.submit(running)
    worker.submit(waiting)
    async for _ in running.events():
      break
    await asyncio.get_running_loop().run_in_executor(None, worker.stop)
    for made in (running, waiting, job(prompt(1))):
      worker.submit(made)
      with pytest.raises(ApiError, match="The server is stopping"):
        async for _ in made.events():
          pass

  asyncio.run(run())
  assert not worker.has_failed
