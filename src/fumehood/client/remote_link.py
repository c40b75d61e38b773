"""The verbs of docs/wire.md over HTTP, so that files, contexts and processes are written once for both transports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fumehood.agent import wire
from fumehood.client.port import Stream
from fumehood.client.remote_streams import Download, Listing, RemoteStream, Socket, Upload
from fumehood.client.server import Server, piece
from fumehood.errors import SandboxGone, Unsupported, WireError


@dataclass(frozen=True, slots=True)
class Route:
    """Arguments named in `path` go there; the others into the query of a GET or DELETE, else into a JSON body."""

    method: str
    path: str
    wraps: str = ""  # the verb's END holds the answer under this name


CALLS: Mapping[str, Route] = {
    "exec.list": Route("GET", "/processes"),
    "exec.signal": Route("POST", "/processes/{pid}/signal"),
    "exec.resize": Route("POST", "/processes/{pid}/resize"),
    "context.list": Route("GET", "/contexts"),
    "context.create": Route("POST", "/contexts"),
    "context.restart": Route("POST", "/contexts/{id}/restart"),
    "context.interrupt": Route("POST", "/contexts/{id}/interrupt"),
    "context.remove": Route("DELETE", "/contexts/{id}"),
    "files.stat": Route("GET", "/files/stat", "entry"),
    "files.mkdir": Route("POST", "/files/mkdir", "entry"),
    "files.move": Route("POST", "/files/move", "entry"),
    "files.remove": Route("DELETE", "/files"),
}


class RemoteLink:
    """`gone` says why the sandbox ended, once this side knows: the server need not be asked again."""

    def __init__(self, server: Server, sandbox_id: str) -> None:
        self.server, self.base, self.gone = server, f"/v1/sandboxes/{piece(sandbox_id)}", ""
        self.sockets: set[Socket] = set()
        self._streams: Mapping[str, Callable[[dict[str, Any]], RemoteStream]] = {
            "exec.start": lambda given: Socket(self, "/processes", first=given),
            "files.watch": lambda given: Socket(self, "/files/watch", query=given),
            "files.read": lambda given: Download(self, given),
            "files.write": lambda given: Upload(self, given),
            "files.list": lambda given: Listing(self, given),
        }

    async def ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        self.check()
        return await self.server.json(method, self.base + path, **request)

    async def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        route, rest = CALLS[verb], dict(arguments)
        path = route.path.format_map({k: piece(str(rest.pop(k))) for k in list(rest) if f"{{{k}}}" in route.path})
        where = "query" if route.method in ("GET", "DELETE") else "body"
        answer = await self.ask(route.method, path, **({where: rest} if rest or where == "body" else {}))
        return {route.wraps: answer} if route.wraps else answer

    async def open(self, verb: str, **arguments: Any) -> Stream:
        self.check()
        if verb not in self._streams:
            raise Unsupported(f"{verb} is not served over HTTP", remediation="use the methods of Sandbox")
        stream = self._streams[verb](arguments)
        await stream.start()
        return stream

    def checked_json(self, frame: wire.Frame) -> dict[str, Any]:
        try:
            return frame.json()
        except wire.BadFrame as e:
            raise WireError("the server broke the protocol", cause=str(e)) from None

    def check(self) -> None:
        if self.gone:
            raise SandboxGone("the sandbox ended", cause=self.gone, remediation="create a new sandbox")

    async def aclose(self) -> None:
        for followed in list(self.sockets):
            await followed.cancel()
