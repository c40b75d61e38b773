"""The microVM tier: a guest kernel of its own for each sandbox, under Firecracker or QEMU."""
