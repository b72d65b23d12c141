"""A page as headless Chromium sees it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any, NamedTuple
from urllib.parse import unquote

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Runs in the page: what went wrong, and how wide everything came out.
_PROBE = """<script>
const problems = [];
addEventListener('error', e => problems.push(e.message || 'failed: ' + (e.target.src || e.target.href)), true);
addEventListener('securitypolicyviolation', e => problems.push('blocked: ' + e.blockedURI));
addEventListener('load', () => {
  const room = document.documentElement.clientWidth;  // less a scroll bar
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .plot')
    && e.getBoundingClientRect().right > room + 1).map(e => e.tagName + '.' + e.className);
  const texts = [...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height);
  const report = {
    problems, wide, width: document.documentElement.scrollWidth, viewport: innerWidth, room,
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    background: getComputedStyle(document.body).backgroundColor, color: getComputedStyle(document.body).color,
    ink: getComputedStyle(document.querySelector('figure svg text')).fill,
    smallest: Math.min(...texts.filter(h => h > 0)),
    sizes: [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().width),
    requests: performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:')),
  };
  parent.document.documentElement.dataset.report = encodeURIComponent(JSON.stringify(report));
});
</script>"""
# Nothing may come from anywhere else, and only the probe may run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'unsafe-inline'"


class Seen(NamedTuple):
  report: dict[str, Any]
  console: list[str]


def find() -> str | None:
  """The browser: $CHROME, or one on the PATH."""
  return os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)


def look(browser: str, page: pathlib.Path, scratch: pathlib.Path, width: int, dark: bool) -> Seen:
  """Opens the page in a frame of `width` pixels, which may be narrower than a window can be."""
  text = page.read_text().replace(
    "<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{_POLICY}">{_PROBE}', 1
  )
  quoted = text.replace("&", "&amp;").replace('"', "&quot;")
  frame = scratch / "frame.html"
  style = f"border: 0; width: {width}px; height: 900px"
  frame.write_text(f'<!doctype html><html><body><iframe style="{style}" srcdoc="{quoted}"></iframe></body></html>')
  flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,1000"]
  flags += [
    "--virtual-time-budget=5000",
    f"--user-data-dir={scratch / 'profile'}",
    *(["--force-dark-mode"] if dark else []),
  ]
  done = subprocess.run([browser, *flags, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=120)
  found = re.search(r'data-report="([^"]*)"', done.stdout)
  assert found, done.stderr[-2000:]
  console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
  return Seen(json.loads(unquote(found.group(1))), console)


def screenshot(browser: str, page: pathlib.Path, file: pathlib.Path, scratch: pathlib.Path, dark: bool) -> None:
  flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,2400"]
  flags += [f"--user-data-dir={scratch / 'profile'}"]
  flags += ["--force-dark-mode"] * dark
  subprocess.run([browser, *flags, f"--screenshot={file}", page.as_uri()], check=True, capture_output=True, timeout=120)
