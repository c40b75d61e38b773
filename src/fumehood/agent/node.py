"""The program that a javascript context runs: one JSON request per line on its socket, one JSON answer per line.

{"run", "code", "env"} -> {"run"} and {"data": bundle}? or {"error": {"name", "value", "text"}}? or {"interrupted": true}?
It evaluates through its own inspector in V8's REPL mode: top-level await, `const` and `let` that stay and may be declared
again. vm's breakOnSigint stops a loop that never yields; the SIGINT handler ends the wait for a promise that never settles.
V8 gives such an evaluation no dynamic import, so imports are rewritten to the driver's own.
"""

DRIVER = r"""
(() => {
  const { Session } = require("node:inspector"), vm = require("node:vm"), util = require("node:util");
  const channel = new (require("node:net").Socket)({ fd: Number(process.argv[1]) });
  const inspector = new Session();
  inspector.connect();
  const post = (method, params) => new Promise((resolve, reject) =>
    inspector.post(method, params, (error, reply) => (error ? reject(error) : resolve(reply))));
  const hidden = (name, value) => Object.defineProperty(globalThis, name, { value, configurable: true });
  hidden("__import", (name) => import(name.startsWith(".") ? require("node:path").resolve(name) : name));
  let interrupt = null;
  process.on("SIGINT", () => interrupt?.());
  for (const name of ["uncaughtException", "unhandledRejection"])
    process.on(name, (error) => process.stderr.write(`Uncaught ${util.inspect(error)}\n`));

  function bundle(value) {
    if (value === undefined) return "{}";
    const data = { "text/plain": util.inspect(value) };
    const plain = Array.isArray(value) || (value && Object.getPrototypeOf(value) === Object.prototype);
    try { if (plain) data["application/json"] = JSON.parse(JSON.stringify(value)); } catch { /* cycles, BigInt */ }
    return JSON.stringify({ data });
  }
  hidden("__bundle", bundle);
  const bundler = post("Runtime.evaluate", { expression: "__bundle" });
  bundler.then(() => delete globalThis.__bundle);

  // V8's module syntax has no place in a REPL: `import a, { b as c } from "m"` becomes an awaited object pattern.
  const pattern = (names) => names.trim().startsWith("{") ? names.replace(/\s+as\s+/g, ": ")
    : names.includes("*") ? names.replace(/\*\s*as\s+/, "") : `{ default: ${names.trim()} }`;
  const rewrite = (code) => code
    .replace(/^import\s+(?:([\w$]+)\s*,\s*)?([\w$]+|\*\s*as\s+[\w$]+|\{[^}]*\})\s+from\s+(["'][^"'\n]+["'])/gm,
      (_, first, names, from) => (first ? `const ${pattern(first)} = await __import(${from}); ` : "")
        + `const ${pattern(names)} = await __import(${from})`)
    .replace(/^import\s+(["'][^"'\n]+["'])/gm, "await __import($1)")
    .replace(/\bawait\s+import\s*\(/g, "await __import(");

  function failure({ exception, text }) {
    if (exception?.subtype !== "error") {
      const value = exception ? String(exception.description ?? exception.value) : text;
      return { name: "Uncaught", value, text: `Uncaught ${value}` };
    }
    const stack = exception.description.split(/\n    at Session\.post/)[0];
    const value = stack.split("\n    at ")[0].replace(/^[\w$.]*(?: \[\w+\])?: /, "");
    return { name: exception.className, value, text: stack };
  }

  function evaluate(expression) {
    return new Promise((resolve, reject) => {
      interrupt = () => resolve({ interrupted: true });
      hidden("__run", () => inspector.post("Runtime.evaluate", { expression, replMode: true },
        (error, reply) => (error ? reject(error) : resolve(reply))));
      try { vm.runInThisContext("__run()", { breakOnSigint: true }); }
      catch (error) { if (error.code === "ERR_SCRIPT_EXECUTION_INTERRUPTED") interrupt(); else reject(error); }
      delete globalThis.__run;
    });
  }

  async function answer(code) {
    const reply = await evaluate(rewrite(code));
    if (reply.interrupted) return reply;
    if (reply.exceptionDetails) return { error: failure(reply.exceptionDetails) };
    const { objectId, value, unserializableValue } = reply.result;
    const shown = await post("Runtime.callFunctionOn", {
      objectId: (await bundler).result.objectId, functionDeclaration: "function (value) { return this(value); }",
      arguments: [objectId ? { objectId } : unserializableValue ? { unserializableValue } : { value }], returnByValue: true,
    });
    post("Runtime.releaseObjectGroup", { objectGroup: "" });
    return shown.exceptionDetails ? { error: failure(shown.exceptionDetails) } : JSON.parse(shown.result.value);
  }

  async function run({ run, code, env }) {
    const before = Object.fromEntries(Object.keys(env).map((name) => [name, process.env[name]]));
    Object.assign(process.env, env);
    const reply = await answer(code).catch(({ name, message, stack }) => ({ error: { name, value: message, text: stack } }));
    interrupt = null;
    for (const [name, value] of Object.entries(before))
      if (value === undefined) delete process.env[name]; else process.env[name] = value;
    channel.write(JSON.stringify({ run, ...reply }) + "\n");
  }

  require("node:readline").createInterface({ input: channel }).on("line", (line) => run(JSON.parse(line)))
    .on("close", () => process.exit(0));
})();
"""
