# Each target sets up .venv by itself (tools/venv), as root or as an ordinary user.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTEST_ARGS ?=
.PHONY: help demo test check bench lock

help:
	@echo "make demo   run the attacks of the demo in a sandbox, and show what held"
	@echo "make test   the whole suite; by root: as root, as an ordinary user, on microVMs, on cgroup v2, in 25 minutes."
	@echo "            MACHINES=no: the first two, in half of it. PYTEST_ARGS: only the tests it names"
	@echo "make check  ruff and pyright"
	@echo "make bench  measure start and run times on this machine"
	@echo "make lock   pin every dependency anew in requirements.lock"

demo:
	@tools/venv
	@.venv/bin/fumehood demo

test:
	@tools/venv
	@tools/suite $(PYTEST_ARGS)

check:
	@tools/venv
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright

bench:
	@tools/venv
	@.venv/bin/python -m bench

lock:
	@tools/venv
	@.venv/bin/python -m pip install --quiet pip-tools
	@.venv/bin/pip-compile --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras --all-build-deps \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --no-header \
		--extra data --extra server --extra mcp --extra dev --output-file requirements.lock pyproject.toml
	@if grep -nE '://|index-url|find-links' requirements.lock; then echo "requirements.lock names a host" >&2; exit 1; fi
