"""Run jobs in separate processes, so that a job that crashes or hangs does not affect the others."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MARK = "answer "  # marks lines for the parent, because libraries print to stdout as well


def once(command: Sequence[str], **how: Any) -> dict[str, Any]:
    """Run a command and return the JSON of its last line, or {"error": its last line of stderr} if it fails. `how` is
    passed to subprocess.run."""
    done = subprocess.run(command, capture_output=True, text=True, **how)
    if done.returncode:
        return {"error": (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def parser(results: str) -> argparse.ArgumentParser:
    """Create the options of a script that reruns itself for each job: --only, --output and, in a child, --job."""
    made = argparse.ArgumentParser()
    made.add_argument("--only")
    made.add_argument("--output", type=Path, default=RESULTS / results)
    made.add_argument("--job")
    return made


def job(file: str, *words: Any) -> dict[str, Any] | None:
    """Run such a script with --job and return its answer. If it fails, print its stderr and return None."""
    ran = subprocess.run([sys.executable, file, "--job", json.dumps(words)], capture_output=True, text=True)
    if ran.returncode:
        print(f"{words}: {ran.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(ran.stdout.splitlines()[-1])


def answered(options: argparse.Namespace, answer: Callable[..., object]) -> bool:
    """Return whether this process runs a job. If so, print the job's answer, computed on one thread."""
    if options.job:
        import torch

        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        print(json.dumps(answer(*json.loads(options.job))))
    return bool(options.job)


class Apart:
    """A process that answers jobs with `serve`. It is started on demand, and again after a job that ended it.

    command  the command that starts it
    limit    the most seconds that a job may take
    """

    def __init__(self, command: Sequence[str], limit: float) -> None:
        self.command, self.limit = command, limit
        self.child: subprocess.Popen[str] | None = None

    def ask(self, job: Any) -> dict[str, Any]:
        """Return the answer to a job, or {"error": why}."""
        if self.child is None:
            self.child = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        child, late = self.child, threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(self.limit, end)
        timer.start()
        try:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()
            found = next((x for x in child.stdout if x.startswith(MARK)), None)
        except BrokenPipeError:
            found = None
        finally:
            timer.cancel()
        if found is None:
            self.close()
            return {"error": f"took more than {self.limit:g} s" if late.is_set() else "took the process down"}
        answer = json.loads(found.removeprefix(MARK))
        if answer.pop("last", False):
            self.close()
        return answer

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None


def serve(answer: Callable[[Any], dict[str, Any]], sound: Callable[[], object]) -> None:
    """Answer the parent's jobs. `sound` raises if the process is unusable, for example after a fault on a GPU. The
    parent then starts another process for the next job."""
    for job in sys.stdin:
        try:
            found = answer(json.loads(job))
        except Exception as problem:
            found = {"error": said(problem)}
        try:
            sound()
        except Exception as problem:
            found |= {"error": said(problem), "last": True}
        print(MARK + json.dumps(found), flush=True)


def said(problem: Exception) -> str:
    words = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {words[0] if words else ''}"[:300]
