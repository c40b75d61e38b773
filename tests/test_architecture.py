"""The four rooms stay apart: the import rules hold, and the checker is shown to catch a breach of each."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from architecture import LONGER, MAX_LINES, ROOMS, ROOT, sources, violations

PUBLIC = ("client/sandbox.py", "policy/rules.py", "policy/resolve.py", "policy/load.py", "errors.py", "model.py", "config.py")


def test_no_file_breaks_the_rules_of_who_may_import_and_touch_what():
    found = list(violations(sources()))
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("errors.py", "from fumehood.model import Limits", "would be a circle"),
        ("policy/x.py", "import fumehood.runtime.base", "policy decides and never acts"),
        ("policy/x.py", "def f():\n    from ..runtime import base", "policy decides and never acts"),
        ("monitor/x.py", "from fumehood import response", "who watches can't kill"),
        ("monitor/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fumehood.supervisor", "can't kill"),
        ("runtime/native/x.py", "from fumehood.runtime.oci import bundle", "tiers never import each other"),
        ("runtime/native/x.py", "from ..oci.bundle import f", "tiers never import each other"),
        ("runtime/fake.py", "from fumehood.policy.rules import Policy", "nothing above"),
        ("gateway/x.py", "from fumehood.runtime.native.driver import D", "through the service only"),
        ("cli/x.py", "from fumehood.supervisor import Supervisor", "thin over the client"),
        ("newroom.py", "x = 1", "belongs to no room"),
        ("agent/x.py", "from fumehood.model import Limits", "only the stdlib is sure"),
        ("agent/x.py", "def f():\n    import numpy", "only the stdlib is sure"),
        ("agent/python.py", "import IPython", "inside functions"),
        ("agent/python.py", "class A:\n    import IPython", "inside functions"),
        ("agent/serve.py", "from . import notebook", "inside a function"),
        ("supervisor.py", "import ctypes", "raw system calls"),
        ("supervisor.py", "from ctypes import CDLL", "raw system calls"),
        ("supervisor.py", "import os\nos.fork()", "copies locks"),
        ("client/x.py", "import os\nos.environ['A']", "settings have one reader"),
        ("client/x.py", "from os import environ", "settings have one reader"),
        ("client/x.py", "import os\nos.getenv('A')", "settings have one reader"),
        ("execution.py", "import pickle", "unpickling runs what the bytes say"),
        ("execution.py", "from marshal import loads", "unpickling runs what the bytes say"),
        ("execution.py", "eval('1')", "a guest's bytes are data"),
        ("execution.py", "import importlib\nimportlib.import_module(x)", "a guest's bytes are data"),
        ("execution.py", "__import__('a')", "a guest's bytes are data"),
        ("supervisor.py", "import sqlite3", "only SQL is in the store"),
        ("pool.py", "\n" * (MAX_LINES + 1), "split it"),
    ],
)
def test_a_planted_breach_is_caught_and_its_reason_printed(path, source, said):
    found = list(violations({path: source}))
    assert len(found) == 1 and said in found[0] and found[0].startswith(path), found


def test_what_the_rules_allow_is_not_reported():
    assert not list(
        violations(
            {
                "agent/python.py": "def f():\n    import IPython\n    exec('1')",
                "agent/notebook.py": "import IPython",
                "agent/rich.py": "def f():\n    from . import notebook",
                "agent/x.py": "import json\nfrom . import wire\nfrom .wire import Frame",
                "policy/x.py": "from fumehood.policy.rules import Policy\nfrom fumehood import errors",
                "runtime/native/x.py": "import ctypes\nfrom fumehood.runtime.base import Handle",
                "runtime/oci/__init__.py": "",
            }
        )
    )


def test_every_exception_of_length_is_still_needed_and_has_a_reason():
    for path, reason in LONGER.items():
        assert (ROOT / path).read_text().count("\n") > MAX_LINES, f"{path} is short again: take it off LONGER"
        assert reason


def test_every_room_says_why():
    assert all(why for _, why in ROOMS.values())


@pytest.mark.parametrize("path", PUBLIC)
def test_every_public_function_says_what_it_takes_and_gives(path):
    """Properties excepted: their name and type say it. The sync twin of a described async method needs no second text."""
    tree = ast.parse((ROOT / path).read_text())
    scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
    functions = [n for s in scopes for n in s.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    described = {f.name for f in functions if ast.get_docstring(f)}
    plain = [f for f in functions if "property" not in [getattr(d, "id", "") for d in f.decorator_list]]
    bare = [f"{path}:{f.lineno}: {f.name}" for f in plain if not f.name.startswith("_") and f.name not in described]
    assert not bare, "no docstring:\n" + "\n".join(bare)


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports them as top-level modules, so that a second one of a name stops the whole run."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, n in names.items() if n > 1] == []
