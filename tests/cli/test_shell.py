"""`fumehood shell` on a real pseudo-terminal."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest


class Terminal:
    def __init__(self, command: list[str]) -> None:
        self.screen, self.terminal = pty.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(self.terminal)
        self.process = subprocess.Popen(
            command, stdin=self.terminal, stdout=self.terminal, stderr=self.terminal, start_new_session=True
        )
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, line: str) -> None:
        os.write(self.screen, line.encode() + b"\r")

    def wait_for(self, text: bytes) -> None:
        deadline = time.monotonic() + 20
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.screen], [], [], 0.2)[0]:
                self.seen += os.read(self.screen, 65536)


@pytest.fixture
def terminal(command: list[str]) -> Iterator[Terminal]:
    opened = Terminal([*command, "shell"])
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.screen)
    os.close(opened.terminal)


def test_a_shell_runs_inside_follows_the_window_and_restores_the_terminal(terminal: Terminal) -> None:
    terminal.wait_for(b"sandbox:")
    terminal.type("echo $((40+2))-$(hostname)")
    terminal.wait_for(b"42-sandbox")
    terminal.resize(40, 132)
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.type("sleep 0.3; stty size")
    terminal.wait_for(b"40 132")
    terminal.type("exit 5")
    assert terminal.process.wait(20) == 5
    assert termios.tcgetattr(terminal.terminal) == terminal.before


def test_ctrl_c_goes_to_the_program_inside(terminal: Terminal) -> None:
    terminal.wait_for(b"sandbox:")
    terminal.type("sleep 60")
    time.sleep(0.3)
    os.write(terminal.screen, b"\x03")
    terminal.type("echo still-$((1+1))")
    terminal.wait_for(b"still-2")


def test_without_a_terminal_it_says_what_to_use_instead(command: list[str]) -> None:
    done = subprocess.run([*command, "shell"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "fumehood run" in done.stderr
