"""Processes that form a torch.distributed world, kept from test to test."""

import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

# Long enough for a machine under load, short enough that a deadlock is seen.
LIMIT = 120


def forkserver():
    """Forks processes that have imported what each of them needs, and nothing else of this one.

    One server serves every test of a process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch_backend", "torch._dynamo", "on_ranks"])
    # A server looks for modules where Python does as it starts, before Python 3.14, and goes on
    # without a word if it finds none: each rank then imported them, which took it seconds.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))):
        multiprocessing.forkserver.ensure_running()
    return context


def _serve(rank, world, store, pipe):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while (job := pipe.recv()) is not None:
        function, args = job
        torch.manual_seed(0)
        faulthandler.dump_traceback_later(LIMIT - 10)
        try:
            pipe.send((function(rank, world, *args), ""))
        except Exception as error:
            pipe.send((error, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()


class Ranks:
    """`run(f, *args)` calls f(rank, world, *args) on every rank."""

    def __init__(self, world):
        self.world = world
        self.pipes, self.processes = [], []

    def start(self):
        context = forkserver()
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = (rank, self.world, Path(self.folder.name) / "store", theirs)
            self.pipes.append(ours)
            self.processes.append(context.Process(target=_serve, args=args, daemon=True))
            self.processes[-1].start()

    def run(self, function, *args, limit=LIMIT):
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args))
        end = time.monotonic() + limit
        answers = [pipe.recv() if pipe.poll(max(0, end - time.monotonic())) else None
                   for pipe in self.pipes]  # fmt: skip
        if None in answers:
            self.stop()
            late = TimeoutError(f"no answer of rank {answers.index(None)} in {limit} s")
            answers = [(late, "") if x is None else x for x in answers]
        for rank, (error, text) in enumerate(answers):
            if text:
                error.add_note(f"on rank {rank}:\n{text}")
                raise error
        for result, _ in answers:
            if isinstance(result, TimeoutError):
                raise result
        return [result for result, _ in answers]

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.pipes, self.processes = [], []
