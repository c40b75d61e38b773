"""Starts a guest under QEMU or Firecracker and talks to its agent: as little as a test of images and kernels needs."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fumehood.agent import wire
from fumehood.runtime.microvm.assets import Manifest
from fumehood.runtime.microvm.kvm import tsc_khz

PATIENCE_S = 300.0  # a guest kernel that is emulated, on a busy machine


class Answer:
    def __init__(self) -> None:
        self.end: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.output: dict[int, bytes] = defaultdict(bytes)

    @property
    def ok(self) -> dict[str, Any]:
        assert "ok" in self.end, self.end
        return self.end["ok"]

    @property
    def stdout(self) -> str:
        return self.output[wire.STDOUT].decode()

    @property
    def account(self) -> dict[str, Any]:
        """It comes right before END, once."""
        assert [e["type"] for e in self.events].count("account") == 1 and self.events[-1]["type"] == "account", self.events
        return self.events[-1]

    @property
    def result(self) -> str:
        return next(e["data"]["text/plain"] for e in self.events if e["type"] == "result")


class Guest:
    """One running machine in `directory`. `vsock` tells how its channel is reached."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], vsock: bool) -> None:
        self.directory, self.process, self.vsock = directory, process, vsock
        self.channel = socket.socket(socket.AF_UNIX)

    def connect(self) -> dict[str, Any]:
        """A new host: its HELLO."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            self.channel.close()
            self.channel, self._decoder, self._last = socket.socket(socket.AF_UNIX), wire.Decoder(), 0
            self.channel.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionError, FileNotFoundError):
                self.channel.connect(str(self.directory / "channel"))
                return self._hello_over_vsock() if self.vsock else self._hello_over_serial()
            time.sleep(0.05)

    def _hello_over_vsock(self) -> dict[str, Any]:
        self.channel.sendall(b"CONNECT 1024\n")
        line = b""
        while not line.endswith(b"\n"):
            line += self._received(1)
        self.channel.sendall(wire.GREETING)
        return self._frames()[0].json()

    def _hello_over_serial(self) -> dict[str, Any]:
        """What arrives before the answer to our token was meant for somebody else, and may begin in the middle of a frame."""
        token = secrets.token_hex(8)
        self.channel.sendall(wire.encode_json(0, wire.HELLO, {"generation": wire.GENERATION, "greet": token}))
        data = b""
        while (start := data.find(b'{"greet":"' + token.encode() + b'",') - wire.HEADER_BYTES) < 0:
            data += self._received()
        frames = self._decoder.feed(data[start:])
        return (frames or self._frames())[0].json()

    def _frames(self) -> list[wire.Frame]:
        while not (frames := self._decoder.feed(self._received())):
            pass
        return frames

    def _received(self, most: int = 1 << 16) -> bytes:
        if not (data := self.channel.recv(most)):
            raise ConnectionResetError
        return data

    def call(self, verb: str, **arguments: Any) -> Answer:
        self._last += 1
        self.channel.sendall(wire.encode_json(self._last, wire.OPEN, {"verb": verb, **arguments}))
        answer = Answer()
        while not answer.end:
            for frame in self._frames():
                assert frame.stream == self._last, frame
                if frame.kind == wire.DATA:
                    answer.output[frame.payload[0]] += frame.payload[1:]
                elif frame.kind == wire.EVENT:
                    answer.events.append(frame.json())
                else:
                    answer.end = frame.json()
        return answer

    def sh(self, script: str) -> Answer:
        return self.call("exec.start", argv=["sh", "-c", script], env={}, stdin=False)

    def run(self, code: str) -> Answer:
        return self.call("context.run", code=code, language="python", env={})

    def said(self) -> str:
        return "".join(p.read_text(errors="replace")[-3000:] for p in self.directory.glob("*.log"))


@contextlib.contextmanager
def _running(command: list[str], directory: Path, vsock: bool) -> Iterator[Guest]:
    with (directory / "vmm.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    guest = Guest(directory, process, vsock)
    try:
        yield guest
    finally:
        guest.channel.close()
        process.kill()
        process.wait()


@contextlib.contextmanager
def qemu(kernel: Manifest, rootfs: Path, directory: Path, args: str = "") -> Iterator[Guest]:
    boot_args = f"{kernel.facts['boot_args']} tsc_early_khz={tsc_khz()} {args}"
    command = [
        "qemu-system-x86_64",
        "-M",
        f"microvm,acpi={'on' if kernel.facts['acpi'] else 'off'}",
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        "512",
        "-smp",
        "1",
    ]
    command += ["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-sandbox", "on", "-serial", "file:console.log"]
    command += ["-kernel", str(kernel.path("bzImage")), "-append", boot_args]
    command += ["-initrd", str(kernel.path("initrd"))] if "initrd" in kernel.files else []
    command += ["-drive", f"id=root,file={rootfs},format=raw,if=none,readonly=on", "-device", "virtio-blk-device,drive=root"]
    command += ["-chardev", "socket,id=channel,path=channel,server=on,wait=off", "-device", "virtio-serial-device"]
    with _running([*command, "-device", "virtserialport,chardev=channel,name=fumehood.agent"], directory, False) as guest:
        yield guest


@contextlib.contextmanager
def firecracker(binary: Path, kernel: Manifest, rootfs: Path, directory: Path, args: str = "") -> Iterator[Guest]:
    boot_args = f"{kernel.facts['boot_args']} tsc_early_khz={tsc_khz()} lpj={tsc_khz() * 10} {args}"
    config = {
        "boot-source": {"kernel_image_path": str(kernel.path("vmlinux")), "boot_args": boot_args},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 256},
        "drives": [{"drive_id": "rootfs", "path_on_host": str(rootfs), "is_root_device": False, "is_read_only": True}],
        "vsock": {"guest_cid": 3, "uds_path": "channel"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    with _running([str(binary), "--no-api", "--config-file", "config.json"], directory, True) as guest:
        yield guest
