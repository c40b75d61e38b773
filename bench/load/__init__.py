"""The service under load, from outside: a real `fumehood serve` of its own, driven over HTTP on loopback."""
