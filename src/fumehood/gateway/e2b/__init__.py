"""The protocol of E2B's SDKs on the same port as our own API. docs/e2b.md says what works and what differs."""

from .routing import route

__all__ = ["route"]
