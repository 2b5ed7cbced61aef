"""Processes that share a gloo group and run one function after another: one start for all the tests of a module.

Lightning finds itself in the hands of another launcher and the group made: it starts no process and opens no port.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta
from functools import cache

import pytest
import torch
from torch import distributed


def forkserver():
    """What starts processes that find the slow imports done: one server for all tests of this run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor.parallel", "tests.sharding"])
    return context


SECONDS = 60  # for one function on all processes; measured: at most 3 alone on two cores


class World:
    """So many processes, started when first asked, and again after an error: some of them may still wait for others."""

    def __init__(self, size):
        self.size, self._members = size, []

    def run(self, function, *args):
        """Call a function of a module on every process; returns what each gave, by rank. Its errors fail the test."""
        if not self._members:
            self._start()
        for _, pipe in self._members:
            pipe.send_bytes(pickle.dumps((function, args, warnings.filters)))
        answers = []
        errors = []
        end = time.monotonic() + SECONDS
        for rank, (process, pipe) in enumerate(self._members):
            answer, error = _answer(process, pipe, end)
            answers.append(answer)
            errors += [f"rank {rank} of {self.size}: {error}"] if error else []
            end = min(end, time.monotonic() + 5) if error else end
        if errors:
            self.stop()
            pytest.fail("\n".join(errors), pytrace=False)
        return answers

    def stop(self):
        """End the processes."""
        for process, pipe in self._members:
            pipe.close()
            process.kill()
            process.join()
        self._members = []

    def _start(self):
        if sys.platform != "linux":
            pytest.skip("groups of processes are tested on Linux only")
        context = forkserver()
        store = tempfile.mkdtemp(dir=os.getcwd())
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self.size, f"{store}/ranks", there), daemon=True
            )
            process.start()
            there.close()
            self._members.append((process, here))


def _answer(process, pipe, end):
    """What a process sent before ``end``, or has sent: what its function gave, and its error if there was one."""
    if not pipe.poll(max(0.0, end - time.monotonic())):
        return None, "no answer in time"
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        process.join(5)
        return None, f"ended with exit code {process.exitcode}"


def _work(rank, size, store, pipe):
    """Answer with what each function gives, or with its error, as long as someone asks."""
    os.environ.update(
        {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    )  # what a launcher tells Lightning
    timeout = timedelta(seconds=SECONDS)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timeout
    )
    with suppress(EOFError):
        while True:
            function, args, warnings.filters[:] = pickle.loads(
                pipe.recv_bytes()
            )  # what is an error there is one here
            try:
                torch.manual_seed(0)
                answer = function(*args), None
            except Exception:
                answer = None, traceback.format_exc()
            pipe.send_bytes(pickle.dumps(answer))


@cache
def world(size):
    """The processes that all tests of this run with so many share; they end with it."""
    return World(size)
