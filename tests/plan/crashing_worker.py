"""Stands for zeda_jax.plan.worker: does as the job's "model" says."""

import json
import os
import pathlib
import sys

job = json.load(sys.stdin)
does = job["model"]["quickly" if job["quickly"] else "in full"]
if does == "crash":
  print("F0000 Check failed: reduction_loop_bound == 1 (4 vs. 1)\n*** stack dump ***", file=sys.stderr, flush=True)
  os.abort()
if does == "raise":
  raise ValueError("no such thing")
answer = {"outputs": 2, "temporaries": 3, "needed": 0, "traffic": [["all-gather", 4, 8.0]]}
answers = {"works": answer, "refused": {**answer, "needed": 1e12, "traffic": None}, "error": {"error": "a sentence."}}
pathlib.Path(sys.argv[1]).write_text(json.dumps(answers[does]))
