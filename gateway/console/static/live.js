// What the server pushes while a page is seen. A page that nobody sees lets go of its connection, of which a browser
// has only a few for each server.

const main = document.querySelector("main[data-live]");
const signal = document.getElementById("signal");
let source = null;
let hasBeenOpen = false;
let tries = 0;

function connect() {
  if (source || document.hidden) return;
  source = new EventSource(main.dataset.live);
  source.onopen = () => {
    signal.textContent = "";
    tries = 0;
    // What was pushed before this connection, nobody heard.
    if (hasBeenOpen) tell("again", null);
    hasBeenOpen = true;
  };
  source.onerror = () => {
    signal.textContent = "Connecting again…";
    // A browser gives up where the answer was no stream: of a server that is not all there yet, or of one that has
    // nobody signed in any more.
    if (source.readyState === EventSource.CLOSED) again();
  };
  source.addEventListener("fragment", (event) => replace(JSON.parse(event.data)));
  source.addEventListener("points", (event) => tell("points", JSON.parse(event.data)));
  source.addEventListener("again", () => tell("again", null));
  source.addEventListener("changed", (event) => offer(JSON.parse(event.data)));
}

// A list is not made anew under whoever reads it, or has ticked some of it.
function offer(what) {
  const place = document.getElementById("changed");
  if (!place) return;
  const link = document.createElement("a");
  link.href = location.href;
  link.textContent = "Show";
  place.replaceChildren(document.createTextNode(`${what} `), link);
}

async function again() {
  disconnect();
  await new Promise((done) => setTimeout(done, Math.min(30_000, 1000 * 2 ** tries++)));
  const answer = await fetch(main.dataset.live, { method: "HEAD", headers: { accept: "text/event-stream" } }).catch(() => null);
  if (answer && [401, 403, 404].includes(answer.status)) signal.textContent = "No longer live. Load the page again.";
  else connect();
}

function disconnect() {
  source?.close();
  source = null;
}

function tell(name, detail) {
  document.dispatchEvent(new CustomEvent(`lorry:${name}`, { detail }));
}

// The server escaped whatever is text in it. What has the focus keeps it.
function replace({ id, html }) {
  const place = document.getElementById(id);
  if (!place) return;
  const label = place.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  const parsed = new DOMParser().parseFromString(html, "text/html");
  place.replaceChildren(...parsed.body.childNodes);
  if (label) place.querySelector(`[aria-label="${CSS.escape(label)}"]`)?.focus({ preventScroll: true });
}

document.addEventListener("lorry:again", () => offer("There may be something new."));

if (main) {
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
  window.addEventListener("pagehide", disconnect);
  window.addEventListener("pageshow", connect);
  connect();
}
