"""The fake tier's process between host and agent: whatever becomes of either, no process and no directory is left.

Adopts what the agent leaves behind (PR_SET_CHILD_SUBREAPER) and ends it when the agent has ended; the agent ends when its
channel closes, so also when the host's process was killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from typing import NoReturn

from fumehood.agent import child, serve
from fumehood.runtime import tree


def main() -> NoReturn:
    """Arguments: the channel's descriptor, the home to serve and at last remove."""
    channel, home = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    child.prctl(child.PR_SET_CHILD_SUBREAPER, 1)
    agent = os.fork()
    if agent == 0:
        serve.serve(channel, home=home, confine=lambda: None, prestart=("python",))
        os._exit(0)
    channel.close()  # else the host would not see the agent's end as the end of the stream
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.waitpid(-1, 0)[0] != agent:
        pass
    _end_all()
    shutil.rmtree(home)
    os._exit(0)


def _end_all() -> None:
    while left := tree.below(os.getpid()):
        for process in left:
            tree.send(process, signal.SIGKILL)
        time.sleep(0.002)
        _reap()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return
