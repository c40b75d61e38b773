"""`fumehood serve`."""


def serve() -> None:
    """Serve."""
