"""The agent: PID 1 of the sandbox. Answers the verbs of docs/wire.md until the host closes the channel."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from . import child, files, identity, wire
from .args import Args
from .contexts import Contexts
from .loop import Later, Loop, Refused, Stream
from .process import Processes
from .watch import Watch

VERSION = "0.1.0"
HOME = "/home/user"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def serve(
    channel: socket.socket,
    *,
    home: str = HOME,
    confine: Callable[[], None],
    prestart: Sequence[str] = (),
    traceable: bool = False,
) -> None:
    """Returns when the host closes the channel. Raises wire.BadFrame when the host breaks the protocol.

    `confine` runs in every child as the last step before what the caller controls. `prestart` names the languages whose
    default context is forked before HELLO is sent. `traceable` is for tests: it leaves out what keeps user code from
    opening the agent's memory.
    """
    child.settle_as_init(traceable=traceable)
    agent = Agent(home, confine)
    for language in prestart:
        agent.contexts.awake(agent.contexts.default(language))
    agent.loop.attach(channel)
    agent.greet()
    try:
        agent.run()
    finally:  # a PID 1 that ends takes all with it; an agent that is not PID 1 has to do so itself
        agent.processes.kill_all()
        agent.contexts.kill_all()


class Machine(Protocol):
    """What the agent can do where it is PID 1 of a machine of its own."""

    def limit(self, limits: Mapping[str, int]) -> None: ...
    def restrict(self, rules: Mapping[str, Sequence[str]]) -> None: ...
    def renew(self) -> None: ...
    def account(self) -> dict[str, int | bool]: ...


class Agent:
    def __init__(self, home: str, confine: Callable[[], None], machine: Machine | None = None) -> None:
        self._home, self._bound, self._machine = home, dict[str, str](), machine
        self._children: dict[int, Later] = {}
        self.loop = Loop(self._open, self.greet)
        self.processes = Processes(self.loop, home, confine, self._children)
        self.contexts = Contexts(self.loop, home, confine, self._children)
        self._base_env = {
            "PATH": os.environ.get("PATH", DEFAULT_PATH),
            "HOME": home,
            "USER": "user",
            "LOGNAME": "user",
            "LANG": "C.UTF-8",
        }
        self._verbs: dict[str, Callable[[Stream, Args], None]] = {
            "bind": self._bind,
            "ping": lambda s, a: s.end({}),
            "exec.start": self._exec_start,
            "exec.attach": lambda s, a: self.processes.attach(self._accounted(s), a.get("pid", int)),
            "exec.write": lambda s, a: self.processes.write(s, a.get("pid", int)),
            "exec.eof": lambda s, a: s.end(_done(self.processes.eof(a.get("pid", int)))),
            "exec.signal": self._exec_signal,
            "exec.resize": lambda s, a: s.end(_done(self.processes.resize(a.get("pid", int), *a.size()))),
            "exec.list": lambda s, a: s.end({"processes": self.processes.list()}),
            "context.create": self._context_create,
            "context.list": lambda s, a: s.end({"contexts": self.contexts.list()}),
            "context.run": self._context_run,
            "context.warm": lambda s, a: self.contexts.warm(
                s, self.contexts.default(a.get("language", str)), fully=a.get("fully", bool, False)
            ),
            "context.interrupt": lambda s, a: s.end(_done(self.contexts.interrupt(self._context(a)))),
            "context.restart": lambda s, a: s.end(_done(self.contexts.restart(self._context(a)))),
            "context.remove": lambda s, a: s.end(_done(self.contexts.remove(self._context(a)))),
            "context.checkpoint": lambda s, a: self.contexts.checkpoint(s, self._context(a)),
            "context.rollback": lambda s, a: self.contexts.rollback(s, self._context(a), a.get("checkpoint", str)),
            "files.stat": lambda s, a: s.end({"entry": files.entry(a.path("path"))}),
            "files.list": lambda s, a: s.task(files.listing(s, a.path("path"), a.natural("depth", 1) or 1)),
            "files.mkdir": lambda s, a: s.end({"entry": files.mkdir(a.path("path"))}),
            "files.remove": lambda s, a: s.task(files.remove(s, a.path("path"), home)),
            "files.move": lambda s, a: s.task(files.move(s, a.path("source"), a.path("destination"))),
            "files.read": lambda s, a: s.task(
                files.read(s, a.path("path"), a.natural("offset", 0) or 0, a.natural("length", None))
            ),
            "files.write": lambda s, a: _started(files.Upload(s, a.path("path"), a.natural("mode", None))),
            "files.watch": lambda s, a: _started(Watch(self.loop, s, a.path("path"), a.get("recursive", bool, False))),
        }

    def greet(self, token: str | None = None) -> None:
        """Say HELLO to the host that is attached; `token` is what it asked with."""
        hello: dict[str, Any] = {} if token is None else {"greet": token}  # first, so that it can be found among rubbish
        hello |= {"generation": wire.GENERATION, "agent": VERSION, "python": platform.python_version()}
        hello["languages"] = self.contexts.languages
        self.loop.send(wire.encode_json(0, wire.HELLO, hello))

    def run(self) -> None:
        with _child_signal() as wakeup:
            self.loop.reading(wakeup.fileno(), lambda: self._reap(wakeup), producer=False)
            self._reap(wakeup)  # those that ended before the handler was there
            self.loop.run()

    def _open(self, stream: Stream, value: dict[str, Any]) -> None:
        verb = self._verbs.get(str(value.get("verb")))
        if verb is None:
            raise Refused("unsupported", f"no verb {value.get('verb')!r:.40} in generation {wire.GENERATION}")
        verb(stream, Args(value, self._home))

    def _reap(self, wakeup: socket.socket) -> None:
        """All that have ended: our children, and the orphans that the kernel gave to PID 1."""
        with contextlib.suppress(BlockingIOError):
            wakeup.recv(4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if (exited := self._children.pop(pid, None)) is not None:
                    exited.resolve(status)

    # -- verbs with more than one line
    def _bind(self, stream: Stream, args: Args) -> None:
        env, limits, entropy = args.env(), args.limits(), args.get("entropy", str, "")
        rules = args.rules()
        if (limits or rules) and self._machine is None:
            raise Refused("unsupported", "limits and file rules are the host's in this tier")
        identity.renew(args.get("clock_s", (int, float), None), entropy, args.get("hostname", str, ""))
        if self._machine is not None:
            self._machine.limit(limits)
            self._machine.renew()
            if rules:
                self._machine.restrict(rules)
        if entropy:
            self.contexts.reseed()
        self._bound.update(env)
        stream.end({})

    def _accounted(self, stream: Stream) -> Stream:
        if self._machine is not None:
            account = self._machine.account
            stream.last_event = lambda: {"type": "account", **account()}
        return stream

    def _exec_start(self, stream: Stream, args: Args) -> None:
        env = {**self._base_env, **self._bound, **args.env()}
        cwd, stdin, tag = args.path("cwd", ""), args.get("stdin", bool, False), args.get("tag", str, None)
        self.processes.start(self._accounted(stream), args.argv(), env, cwd, stdin, args.pty(), tag)

    def _exec_signal(self, stream: Stream, args: Args) -> None:
        self.processes.signal(args.get("pid", int), args.get("signal", int), args.get("group", bool, False))
        stream.end({})

    def _context(self, args: Args) -> Any:
        return self.contexts.find(args.get("id", str))

    def _context_create(self, stream: Stream, args: Args) -> None:
        context = self.contexts.create(args.get("language", str), args.path("cwd", ""), args.get("id", str, None))
        stream.end(context.describe())

    def _context_run(self, stream: Stream, args: Args) -> None:
        id, language = args.get("id", str, None), args.get("language", str, "python")
        context = self.contexts.find(id) if id is not None else self.contexts.default(language)
        self.contexts.run(self._accounted(stream), context, args.get("code", str), {**self._bound, **args.env()})


def _done(_: None) -> dict[str, Any]:
    return {}


def _started(_: object) -> None:
    return None


@contextlib.contextmanager
def _child_signal() -> Any:
    """A socket that is readable when a child has ended. Not signalfd: the mask would be inherited through execve."""
    mine, pythons = socket.socketpair()
    mine.setblocking(False)
    pythons.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
    try:
        yield mine
    finally:
        signal.set_wakeup_fd(-1)
        mine.close()
        pythons.close()
