"""`zeda serve`: an OpenAI-compatible HTTP server for a static or dynamic checkpoint."""

import argparse
import importlib.util
import os

from zeda_jax.errors import ZedaError

_EPILOG = """POST /v1/completions and /v1/chat/completions, GET /v1/models, /health and /metrics.
SIGTERM or Ctrl-C answers what was begun, refuses the rest, and exits with 0; docs/serve.md."""


def run(command: str, args: list[str]) -> int:
  flags = _parser(command).parse_args(args)
  if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]:
    raise ZedaError(f"{missing[0]} is not installed: pip install 'zeda-jax[serve]'.")
  from zeda_jax.serve.server import Options, serve  # late: `--help` should not wait for JAX

  options = vars(flags) | {"api_key": flags.api_key or os.environ.get("ZEDA_API_KEY") or None}
  return serve(Options(**options), lambda line: print(f"zeda serve: {line}", flush=True))


def _parser(command: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=f"zeda {command}",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=_EPILOG,
    usage=f"zeda {command} DIR [options]",
  )
  add = parser.add_argument
  add("model", metavar="DIR", help="Hugging Face directory, static or dynamic")
  add("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
  add("--port", type=int, default=8000, help="default: %(default)s; 0: a free one")
  add("--api-key", help="that clients must send; better in the environment: ZEDA_API_KEY (default: none)")
  add("--model-name", help="by which clients ask for it (default: the directory's name)")
  add("--num-slots", type=int, default=16, help="responses decoded together (default: %(default)s)")
  add("--max-tokens", type=int, help="tokens in the cache, of all responses (default: 2048 a slot)")
  add("--max-length", type=int, help="tokens of one prompt and response (default: the model's context)")
  add("--max-queue", type=int, default=256, help="responses that may wait; then 429 (default: %(default)s)")
  add("--max-body-bytes", type=int, default=4 * 2**20, help="of a request; then 413 (default: %(default)s)")
  add("--zero-expert-bias", type=float, default=0.0, help="of requests that give none (default: %(default)s)")
  add("--warmup-length", type=int, default=1024, help="compile for prompts up to this first (default: %(default)s)")
  add("--drain-seconds", type=float, default=300, help="to answer what was begun (default: %(default)s)")
  return parser
