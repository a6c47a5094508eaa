"""Processes that train together on gloo, in a moment: forks of one process that has imported the libraries."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

PRELOADED = ["pedyra.app.runs.run", "pedyra.app.report", "pedyra.lab.cli"]
"""What the process imports that the others are forked from."""


def can_fork() -> bool:
    """Whether a fork that computes is safe: on Linux, without an accelerator, whose driver does not survive a fork."""
    return sys.platform == "linux" and not torch.accelerator.is_available()


def together(work: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What `work(rank, size, *arguments)` returns in each of `size` processes, started as torchrun starts them.

    `work` is a function of a module, which sets up torch.distributed itself (`init_process_group("gloo")`, or a
    Trainer). Fails with the traceback of the process that fails first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    environment = launched(size)
    running, ends = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        given = (work, rank, size, arguments, environment, theirs)
        running.append(context.Process(target=_in_process, args=given, daemon=True))
        running[-1].start()
        theirs.close()
        ends.append(ours)
    try:
        results = []
        for rank, end in enumerate(ends):
            assert end.poll(120), f"process {rank} of {size} gives no answer"
            failed, result = end.recv()
            assert not failed, f"process {rank} of {size} failed:\n{result}"
            results.append(result)
        return results
    finally:
        for process in running:
            process.kill()
            process.join()


def launched(size: int) -> dict[str, str]:
    """The environment that torchrun gives, without the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)  # a machine's own name may lead nowhere
    interface = {"GLOO_SOCKET_IFNAME": loopback} if loopback else {}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), **where, **interface}


def _in_process(work: Any, rank: int, size: int, arguments: Any, environment: dict[str, str], answer: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if size > 1:
        os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    try:
        answer.send((False, work(rank, size, *arguments)))
    except BaseException:
        answer.send((True, traceback.format_exc()[-3000:]))
    answer.close()
    # As Python ends, the thread of gloo's last work may want the GIL to drop a reference; it is then ended by force,
    # which C++ answers with an abort.
    os._exit(0)
