// Perfetto's trace processor as its page has it, outside of a browser: a file of its protocol's requests in, its answers
// out. The page's folder and the file are the arguments.
const fs = require("fs"), path = require("path"), vm = require("vm");
const [folder, requests] = process.argv.slice(2);
const file = (url) => fs.readFileSync(path.join(folder, path.basename(String(url))));

process.type = "renderer"; // the module is made for workers of a page, and refuses to run where it takes this for Node
globalThis.self = globalThis;
globalThis.WorkerGlobalScope = class {};
globalThis.location = { href: `file://${folder}/` };
globalThis.XMLHttpRequest = class {
  open(_, url) { this.url = url; }
  send() { this.response = new Uint8Array(file(this.url)).buffer; this.status = 200; this.onload?.(); }
};
globalThis.fetch = async (url) => new Response(file(url), { headers: { "content-type": "application/wasm" } });
console.warn = console.log = () => {};

const port = { postMessage: (answer) => fs.writeSync(1, answer) };
function ask() {
  port.onmessage({ data: new Uint8Array(fs.readFileSync(requests)) });
  process.exit(0);
}

vm.runInThisContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"));
self.onmessage({ data: port });
setTimeout(ask); // it is compiled by now, and has yet to introduce itself
