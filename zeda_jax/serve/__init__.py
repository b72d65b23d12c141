"""An OpenAI-compatible HTTP server around the rollout engine.

One thread owns the engine (worker.py); the event loop owns the connections (app.py). They talk through jobs (jobs.py):
what a request asks of the engine, and the events that come back. FastAPI, uvicorn and prometheus_client come with the
extra `serve`.
"""
