"""The rules of who may import whom and who may touch what, as tables, and a checker that reads source with `ast`.

`violations(files)` takes {path below src/fumehood: source}, so that a test can plant one and see it caught.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "fumehood"
MAX_LINES = 250

NOUNS = ("errors", "model", "events", "records")
# Room (longest prefix wins) -> what of fumehood it may import, and why nothing else. A prefix covers what is below it.
ROOMS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "errors": ((), "everything imports errors; one import back would be a circle"),
    "model": (("errors",), "the nouns do nothing, so they need nothing"),
    "events": (("model", "errors"), "events are nouns"),
    "records": (("model", "errors"), "the service's nouns do nothing either"),
    "config": (("model", "errors"), "settings are read before anything else exists"),
    "agent": (("agent",), "the agent runs inside the sandbox, where only the stdlib is sure to be"),
    "policy": ((*NOUNS, "policy"), "policy decides and never acts: it can't reach what acts"),
    "monitor": ((*NOUNS, "monitor"), "who watches can't kill"),
    "response": ((*NOUNS, "response"), "who acts gets its orders from the supervisor, never from a detector"),
    "store": ((*NOUNS, "store"), "the store keeps nouns and knows no rooms"),
    "scheduler": ((*NOUNS, "scheduler"), "the scheduler orders requests and starts nothing"),
    "pool": ((*NOUNS, "runtime.base", "pool"), "the pool plans; what makes and ends a warm one is handed to it"),
    "outcome": ((*NOUNS, "runtime.base"), "what a run came to is decided from facts alone"),
    "tally": (NOUNS, "it counts what the host saw, and has nobody to ask"),
    "verdict": ((*NOUNS, "outcome", "execution", "runtime.base"), "what was seen of a run becomes its result, and no more"),
    "execution": ((*NOUNS, "outcome", "agent.wire", "runtime.link"), "one execution is followed over a link, on any tier"),
    "runtime": ((*NOUNS, "config", "runtime.base", "runtime.link", "agent"), "a tier knows contract and agent, nothing above"),
    "runtime.tiers": ((*NOUNS, "config", "runtime"), "the one table that knows every tier"),
    "runtime.host": (
        (*NOUNS, "config", "runtime.base", "runtime.host"),
        "what tiers take from the host; it knows none of them",
    ),
    "runtime.native": (
        (*NOUNS, "config", "runtime.base", "runtime.link", "runtime.host", "runtime.native", "agent"),
        "tiers never import each other: one must be removable without the others noticing",
    ),
    "runtime.oci": (
        (*NOUNS, "config", "runtime.base", "runtime.link", "runtime.oci", "agent"),
        "tiers never import each other",
    ),
    "runtime.microvm": (
        (*NOUNS, "config", "runtime.base", "runtime.link", "runtime.rehearsal", "runtime.host", "runtime.microvm", "agent"),
        "tiers never import each other",
    ),
    "runtime.rehearsal": ((*NOUNS, "runtime.link"), "a word with an agent, of any tier"),
    "runtime.fake": ((*NOUNS, "config", "runtime.base", "runtime.tree"), "a tier knows the contract, nothing above"),
    "runtime.keeper": (("agent", "runtime.tree"), "it becomes the agent's parent, so it loads no more than the agent does"),
    "live": ((*NOUNS, "execution", "tally", "verdict", "runtime.base", "runtime.link"), "one sandbox, on any tier"),
    "supervisor": ((*NOUNS, "config", "live", "runtime"), "it makes and ends sandboxes; who may have one is decided above"),
    "lease": ((*NOUNS, "live"), "a live sandbox and whose it is"),
    "bus": (NOUNS, "it hands events on and keeps none"),
    "service": (
        (*NOUNS, "config", "policy", "monitor", "response", "store", "scheduler", "pool", "execution", "live", "lease", "bus",
         "supervisor", "service", "runtime", "agent.wire"),
        "the service joins the rooms and is below every face",
    ),
    "gateway": (
        (*NOUNS, "config", "policy", "service", "lease", "live", "execution", "bus", "store", "agent.wire", "runtime.link",
         "mcp", "gateway"),
        "HTTP reaches a sandbox through the service only",
    ),
    "client": (
        (*NOUNS, "config", "policy", "execution", "live", "supervisor", "runtime", "agent.wire", "client"),
        "the SDK may embed a supervisor and choose its tier; it knows no gateway internals",
    ),
    "mcp": ((*NOUNS, "config", "client", "mcp"), "the MCP server is a caller like any other: it has the SDK and no more"),
    "adapters": ((*NOUNS, "client", "adapters"), "an adapter translates between a framework and the SDK"),
    "demo": ((*NOUNS, "demo"), "the demo's attacks are scripts for the inside; the CLI runs them through the client"),
    "cli": (
        (*NOUNS, "config", "policy", "client", "cli", "demo", "gateway", "mcp", "service", "store"),
        "verbs of the command line are thin over the client; serve starts the gateway, keys opens the store",
    ),
    "cli.image": (
        (*NOUNS, "config", "cli", "runtime.microvm"),
        "it makes what microVMs start from, on this host: no sandbox and no server is involved",
    ),
    "cli.prepare": (
        (*NOUNS, "config", "policy", "client", "cli", "runtime.tiers", "runtime.microvm"),
        "it sets a microVM tier up on this host, and tries it as a user would",
    ),
    "cli.doctor": (
        (*NOUNS, "config", "client", "cli", "runtime.base", "runtime.tiers", "runtime.microvm"),
        "it says what each tier is on this host, by what was proven, or is proven now",
    ),
    "__main__": (("cli",), "the command line by its other name"),
    "__init__": (("client.sandbox", "errors", "model", "policy.rules"), "the package shows public names, lazily"),
}  # fmt: skip

# A dangerous thing -> (files or folders that may do it, with the reason in words).
TOUCH: Mapping[str, tuple[tuple[str, ...], str]] = {
    "ctypes": (
        ("runtime/", "agent/", "demo/"),
        "raw system calls belong where a sandbox is built, inhabited or attacked",
    ),
    "fork": (("runtime/", "agent/", "demo/"), "a fork in a threaded host process copies locks that nobody releases"),
    "environ": (
        ("config.py", "agent/", "runtime/native/zygote.py"),
        "settings have one reader; agent and zygote are processes of their own that set it for their children",
    ),
    "sql": (("store/",), "the only SQL is in the store"),
    "pickle": ((), "unpickling runs what the bytes say; guests send bytes"),
    "eval": (
        (
            "__init__.py",  # names of our own modules, from a constant table
            "agent/",  # running the user's code is its work, inside the sandbox
            "runtime/native/zygote.py",  # preloads modules named by the operator's template, before any guest byte exists
        ),
        "a guest's bytes are data; nothing on the host runs or imports by a name that it was sent",
    ),
}
_MODULES = {"ctypes": "ctypes", "sqlite3": "sql", **dict.fromkeys(("pickle", "marshal", "shelve", "dill"), "pickle")}
_CALLS = {"eval": "eval", "exec": "eval", "__import__": "eval", "import_module": "eval"}
_ATTRIBUTES = {
    **dict.fromkeys(("fork", "forkpty", "posix_spawn"), "fork"),
    **dict.fromkeys(("environ", "getenv", "putenv", "environb", "unsetenv"), "environ"),
}

# Libraries that an image may lack. Inside functions any executor may import them; at load only modules that are themselves
# loaded late: the IPython executor, and the backend that matplotlib loads by name once user code imports pyplot.
LIBRARIES = {"IPython", "traitlets", "matplotlib", "numpy", "pandas", "PIL", "tornado"}
EXECUTORS = ("agent/python.py", "agent/rich.py", "agent/chart.py")
LATE = ("agent/notebook.py", "agent/inline.py")

LONGER: Mapping[str, str] = {
    "model.py": "one flat table of the nouns",
    "service/__init__.py": "the whole face of the service, method by method, over the modules beside it",
    "client/sandbox.py": "the same API twice, async and sync, method by method",
    "client/files.py": "the same API twice, async and sync, over one set of functions",
    "agent/link.py": "one class: a session's requests, interrupts and death are one state",
    "agent/loop.py": "one selector loop and the three nouns that only it and its callers share",
    "agent/contexts.py": "one class: the life of a context, whose states are told from each other by all of its methods",
    "agent/python.py": "both executors and the preload that warms them",
    "agent/shells.py": "two shells over one base class",
    "runtime/host/cgroup.py": "one class: a group is made, entered, bounded, read, frozen, killed, removed as one thing",
}


def sources() -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text() for p in sorted(ROOT.rglob("*.py"))}


def violations(files: Mapping[str, str]) -> Iterator[str]:
    """Each breach as "path:line: what - why it is forbidden"."""
    for path, source in files.items():
        tree = ast.parse(source, path)
        yield from _imports(path, tree)
        yield from _touches(path, tree)
        if path.startswith("agent/"):
            yield from _agent(path, tree)
        if (lines := source.count("\n")) > MAX_LINES and path not in LONGER:
            yield f"{path}: {lines} lines - over {MAX_LINES}; split it, or say in LONGER why it is one thing"


def room_of(module: str) -> str | None:
    matches = [room for room in ROOMS if within(module, room)]
    return max(matches, key=len, default=None)


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imported(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, absolute names, also those inside functions and `if TYPE_CHECKING`."""
    package = ["fumehood", *path.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name` may name a module or an object: the longer form is judged by its prefix.
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def _imports(path: str, tree: ast.AST) -> Iterator[str]:
    room = room_of(_module(path))
    if room is None and path.count("/") and path.endswith("__init__.py") and not ast.unparse(tree).strip('"'):
        return  # an empty package marker
    if room is None:
        yield f"{path}: belongs to no room - add it to ROOMS and say what it may import"
        return
    allowed, why = ROOMS[room]
    for line, name in _imported(path, tree):
        if not within(name, "fumehood") or name.count(".") == 0:
            continue
        target = name.removeprefix("fumehood.")
        if target in ("__version__", _module(path)) or any(within(target, a) for a in allowed):
            continue
        yield f"{path}:{line}: {room} may not import {target} - {why}"


def _touches(path: str, tree: ast.AST) -> Iterator[str]:
    found = [
        (line, name, _MODULES[name.split(".")[0]]) for line, name in _imported(path, tree) if name.split(".")[0] in _MODULES
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            plain = isinstance(node.func, ast.Name) or called == "import_module"
            if plain and called in _CALLS:
                found.append((node.lineno, called, _CALLS[called]))
        if isinstance(node, ast.Attribute) and node.attr in _ATTRIBUTES and ast.unparse(node.value) in ("os", "pty"):
            found.append((node.lineno, f"os.{node.attr}", _ATTRIBUTES[node.attr]))
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found += [(node.lineno, f"os.{a.name}", _ATTRIBUTES[a.name]) for a in node.names if a.name in _ATTRIBUTES]
    for line, what, thing in found:
        allowed, why = TOUCH[thing]
        if not path.startswith(allowed):
            yield f"{path}:{line}: {what} - {why}; only in: {', '.join(allowed) or 'nowhere'}"


def _agent(path: str, tree: ast.Module) -> Iterator[str]:
    why = ROOMS["agent"][1]
    at_load = {node.lineno for node in _at_load(tree) if isinstance(node, ast.Import | ast.ImportFrom)}
    for line, name in _imported(path, tree):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or path in LATE:
            continue
        if top == "fumehood":  # which of fumehood is judged by ROOMS; here only when
            late = f"{name.removeprefix('fumehood.').replace('.', '/')}.py"
            if late in LATE and line in at_load:
                yield f"{path}:{line}: imports {late} at load - {why}; import it inside a function"
        elif not (top in LIBRARIES and path in EXECUTORS and line not in at_load):
            yield f"{path}:{line}: imports {top} - {why}; {', '.join(EXECUTORS)} may, inside functions"


def _at_load(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: everything outside functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _at_load(node)
