"""context.*: code contexts. Each is a session process, forked on first use; its requests run one after the other."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from . import changes, child, pages, tree
from .link import Follower, Link, Reply
from .loop import Later, Loop, Refused, Stream, Task
from .pipes import Ends
from .session import languages, session_main

CONTEXT_ID = re.compile(r"[a-z][a-z0-9]{3,31}\Z")  # model.ID_PATTERN, which the agent can't import (H14)
CANCEL_GRACE_S = 0.1  # the host has a deadline to keep (H17)
INTERRUPT_GRACE_S = 2.0  # the caller wants to keep the state, and IPython's first traceback alone takes over 0.1 s
PID_MAX = 1 << 22  # no kernel has more (proc(5), pid_max); a number that C can't hold would end the agent
OUTCOMES = ("ok", "error", "interrupted")


class Checkpoint:
    """A stopped twin of the session and a copy of the workspace. `twin` shares the pipes of the session it came from."""

    def __init__(self, twin: Link, workspace: str) -> None:
        self.twin, self.workspace = twin, workspace


class Context:
    def __init__(self, id: str, language: str, cwd: str) -> None:
        self.id, self.language, self.cwd = id, language, cwd
        self.link: Link | None = None
        self.queue: deque[tuple[Stream, Task]] = deque()
        self.working = self.removed = False
        self.reseed = False  # its session has random numbers that clones of this machine have, too
        self.checkpoints: dict[str, Checkpoint] = {}

    def describe(self) -> dict[str, Any]:
        return {"id": self.id, "language": self.language, "cwd": self.cwd}


class Contexts:
    def __init__(self, loop: Loop, home: str, confine: Callable[[], None], children: dict[int, Later]) -> None:
        self._loop, self._home, self._confine, self._children = loop, home, confine, children
        self._workspace = changes.Workspace(home)
        self._contexts: dict[str, Context] = {}
        self.languages = languages()  # looked for once: emulated, that takes 20 ms

    # -- requests
    def create(self, language: str, cwd: str, id: str | None = None) -> Context:
        if language not in self.languages:
            raise Refused("unsupported", f"no {language!r} here; this image has {', '.join(self.languages)}")
        if id is not None and not CONTEXT_ID.match(id):
            raise Refused("invalid", f"context id {id[:40]!r} does not match {CONTEXT_ID.pattern}")
        if id in self._contexts:
            raise Refused("exists", f"there is a context {id!r} already")
        if not os.path.isdir(cwd):
            raise Refused("invalid", f"cwd {cwd!r} is not a directory", "ENOENT")
        context = Context(id or f"c{secrets.token_hex(6)}", language, cwd)
        self._contexts[context.id] = context
        return context

    def default(self, language: str) -> Context:
        """The context whose id is the language's name."""
        return self._contexts.get(language) or self.create(language, self._home, language)

    def find(self, id: str) -> Context:
        if id not in self._contexts:
            raise Refused("not_found", f"no context {id[:40]!r}")
        return self._contexts[id]

    def list(self) -> list[dict[str, Any]]:
        return [context.describe() for context in self._contexts.values()]

    def run(self, stream: Stream, context: Context, code: str, env: Mapping[str, str]) -> None:
        stream.outlives_host = True
        self._enqueue(stream, context, self._run(stream, context, code, env))

        def cancel() -> None:
            waiting = [job for job in context.queue if job[0] is stream]
            if not waiting and context.link:
                context.link.interrupt(CANCEL_GRACE_S, "killed after cancel")
            for job in waiting:
                context.queue.remove(job)
                stream.end({**_outcome(context, "interrupted"), "changed": []})

        stream.on_cancel = cancel

    def interrupt(self, context: Context) -> None:
        if context.link:
            context.link.interrupt(INTERRUPT_GRACE_S, "killed after interrupt")

    def restart(self, context: Context) -> None:
        if context.link:
            context.link.kill("restarted")
            if not context.link.busy:
                self._bury(context)

    def remove(self, context: Context) -> None:
        del self._contexts[context.id]
        context.removed = True
        for stream, _ in context.queue:
            stream.fail(Refused("not_found", f"context {context.id} was removed"))
        context.queue.clear()
        for checkpoint in context.checkpoints.values():
            checkpoint.twin.close()
            self._loop.start(_discard(checkpoint.workspace))
        self.restart(context)

    def checkpoint(self, stream: Stream, context: Context) -> None:
        self._enqueue(stream, context, self._checkpoint(stream, context))

    def rollback(self, stream: Stream, context: Context, checkpoint: str) -> None:
        if checkpoint not in context.checkpoints:
            raise Refused("not_found", f"context {context.id} has no checkpoint {checkpoint[:40]!r}")
        self._enqueue(stream, context, self._rollback(stream, context, context.checkpoints[checkpoint]))

    def reseed(self) -> None:
        """Sessions get random numbers of their own before they run anything again (H20)."""
        for context in self._contexts.values():
            context.reseed = context.link is not None

    def kill_all(self) -> None:
        for context in self._contexts.values():
            for link in (context.link, *(c.twin for c in context.checkpoints.values())):
                if link:
                    link.kill("the agent ends")

    # -- the queue of one context
    def _enqueue(self, stream: Stream, context: Context, job: Task) -> None:
        context.queue.append((stream, job))
        if not context.working:
            context.working = True
            self._loop.start(self._work(context))

    def _work(self, context: Context) -> Task:
        while context.queue:
            stream, job = context.queue.popleft()
            with stream.answering():
                yield from job
            if link := context.link:
                yield from link.settle()
                if context.link is link and link.doomed:  # else a restart was faster
                    self._bury(context)
        context.working = False

    def _run(self, stream: Stream, context: Context, code: str, env: Mapping[str, str]) -> Task:
        earlier = context.link
        link = self.awake(context)
        before = self._workspace.scan()
        request = _asked(context, "run", code=code, env=dict(env))
        if link is earlier:  # what a new one says may be the reason why it dies of this run
            yield from link.drain()  # what threads and orphans of earlier runs wrote is no part of this one (H16)
        reply: Reply = yield link.call(request, Follower(stream.data, stream.event))
        yield from link.drain()
        if reply.error:
            raise Refused(reply.error["code"], reply.error["message"])
        outcome = _outcome(context, **_checked(reply))
        if outcome["outcome"] == "died":
            self._bury(context)
        stream.end({**outcome, **changes.difference(before, self._workspace.scan())})

    def warm(self, stream: Stream, context: Context, *, fully: bool) -> None:
        """Have its session ready before the first run: what a pool asks of a sandbox that nobody has claimed yet. `fully`, as
        before a machine's snapshot: with all the libraries that it has."""
        self._enqueue(stream, context, self._warm(stream, context, fully))

    def _warm(self, stream: Stream, context: Context, fully: bool) -> Task:
        link = self.awake(context)
        if fully:
            pages.own()  # before the session: what was there stays on our account, and its limit is its user's
        reply: Reply = yield link.call(_asked(context, "warm", fully=fully))
        if reply.error or reply.ok is None:
            raise Refused("internal", f"the session of {context.id} did not come up: {reply.error or reply.death}")
        stream.end({})

    def _checkpoint(self, stream: Stream, context: Context) -> Task:
        """The twin first: it costs a fork, and languages that have none say so before anything is copied."""
        link = self.awake(context)
        reply: Reply = yield link.call(_asked(context, "checkpoint"))
        twin = self._adopt(reply, link)
        workspace = tempfile.mkdtemp(prefix=".checkpoint-")
        try:
            yield from tree.copy(self._home, os.path.join(workspace, "home"))
            _still_there(context)
        except BaseException:
            twin.close()
            yield from _discard(workspace)
            raise
        name = f"check{len(context.checkpoints) + 1}"
        context.checkpoints[name] = Checkpoint(twin, workspace)
        stream.end({"checkpoint": name})

    def _rollback(self, stream: Stream, context: Context, checkpoint: Checkpoint) -> Task:
        """One ordered recipe: all that can fail (copy, wake) comes before all that destroys (kill, swap)."""
        stage = os.path.join(self._home, f".rollback-{secrets.token_hex(4)}")
        try:
            yield from tree.copy(os.path.join(checkpoint.workspace, "home"), stage)
            _still_there(context)
            reply: Reply = yield checkpoint.twin.call({"verb": "wake"})
            woken = self._adopt(reply, checkpoint.twin)
            if context.removed:
                woken.close()
                _still_there(context)
        except BaseException:
            if os.path.lexists(stage):
                yield from tree.remove(stage)
            raise
        self._bury(context)
        context.link = woken
        woken.listen()
        yield from tree.empty(self._home, keep=os.path.basename(stage))
        tree.lift(stage, self._home)
        stream.end({})

    # -- session processes
    def awake(self, context: Context) -> Link:
        """The context's session, forked now if there is none. Raises OSError (EAGAIN: pids limit)."""
        if context.link and context.link.doomed:
            self._bury(context)
        if context.link is None:
            context.link = self._fork(context)
            context.link.listen()
        return context.link

    def _fork(self, context: Context) -> Link:
        with Ends() as ends:
            null, (out, out_inner), (err, err_inner) = ends.null(), ends.from_child(), ends.from_child()
            mine, theirs = socket.socketpair()
            with theirs:
                pid = child.fork(lambda: self._become(context, theirs), (null, out_inner, err_inner))
        return Link(self._loop, self._children, pid, mine, (out, err))

    def _become(self, context: Context, control: socket.socket) -> NoReturn:
        child.confined(self._confine, keep=control.fileno())
        # After confine(), not before: from here on others of our uid may trace this process, and without its filter it
        # would be their way around theirs. The session needs it: /proc/self is root's otherwise.
        child.prctl(child.PR_SET_DUMPABLE, 1)
        session_main(control, context.language, context.cwd)

    def _adopt(self, reply: Reply, origin: Link) -> Link:
        """The process behind the socket that came with a reply. Its pid is a claim of the guest's: never 1, never one
        that is known already."""
        if reply.error:
            raise Refused(reply.error["code"], reply.error["message"])
        pid = (reply.ok or {}).get("pid")
        if reply.control is None or not isinstance(pid, int) or not 1 < pid < PID_MAX or pid in self._children:
            if reply.control:
                reply.control.close()
            raise Refused("not_found", "the process that would have been copied is gone or does not answer properly")
        return Link(self._loop, self._children, pid, reply.control, origin.duplicate_outputs())

    def _bury(self, context: Context) -> None:
        if context.link:
            context.link.close()
            context.link = None


def _asked(context: Context, verb: str, **request: Any) -> dict[str, Any]:
    reseed, context.reseed = context.reseed, False
    return {"verb": verb, **request, **({"reseed": True} if reseed else {})}


def _checked(reply: Reply) -> dict[str, Any]:
    if reply.ok is None:
        return {"outcome": "died", **(reply.death or {})}
    outcome, count = reply.ok.get("outcome"), reply.ok.get("execution_count")
    if outcome not in OUTCOMES or not isinstance(count, (int, type(None))):
        return {"outcome": "died", "exit_code": None, "signal": None, "reason": "broke the protocol: a senseless END"}
    code = reply.ok.get("exit_code")  # of a shell that the run ended
    return {"outcome": outcome, "execution_count": count, **({"exit_code": code} if isinstance(code, int) else {})}


def _outcome(context: Context, outcome: str, execution_count: int | None = None, **more: Any) -> dict[str, Any]:
    return {"context": context.id, "outcome": outcome, "execution_count": execution_count, **more}


def _still_there(context: Context) -> None:
    if context.removed:
        raise Refused("not_found", f"context {context.id} was removed")


def _discard(workspace: str) -> Task:
    with contextlib.suppress(FileNotFoundError):  # /tmp is the guest's: it may have removed the copy
        yield from tree.remove(workspace)
