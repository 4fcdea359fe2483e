// A plot for each metric: of one run, or of several over each other. The numbers come as JSON, and new ones as events.

import uPlot from "./vendor/uPlot.esm.js";

const place = document.getElementById("plots");
const POINTS_AT_MOST = 4000;
const TABLE_ROWS = 20;
const plots = new Map();
let runs = [];

const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
const told = (value) => (value === null || value === undefined ? "not finite" : number.format(value));
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// What is drawn stays until there is something newer.
async function load() {
  const answer = await fetch(place.dataset.curves, { headers: { accept: "application/json" } });
  if (!answer.ok) throw new Error(await answer.text());
  runs = (await answer.json()).runs;
  for (const plot of plots.values()) plot.destroy();
  plots.clear();
  place.replaceChildren();
  for (const name of names()) plots.set(name, new Plot(name));
  if (!plots.size) place.append(problem("No step was told yet.", "empty"));
  place.dataset.ready = "yes";
}

// Of the training first, as the server has them.
function names() {
  return [...new Set(runs.flatMap((run) => Object.keys(run.series)))];
}

function problem(text, kind = "problem") {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  return line;
}

function failed(error) {
  if (plots.size) console.warn(error);
  else place.replaceChildren(problem(`The numbers could not be fetched: ${error.message}`));
}

function take(points) {
  const touched = new Set();
  for (const { run: id, step, values } of points) {
    const run = runs.find((each) => each.id === id);
    if (!run) continue;
    for (const [name, value] of Object.entries(values)) {
      if (!plots.size) place.replaceChildren();
      const series = (run.series[name] ??= { steps: [], values: [] });
      put(series, step, value);
      if (!plots.has(name)) plots.set(name, new Plot(name));
      touched.add(name);
    }
  }
  for (const name of touched) plots.get(name).draw();
}

// Steps come in order, or again; what is older goes where it belongs.
function put({ steps, values }, step, value) {
  let at = steps.length;
  while (at > 0 && steps[at - 1] >= step) at -= 1;
  const isThere = steps[at] === step;
  steps.splice(at, isThere ? 1 : 0, step);
  values.splice(at, isThere ? 1 : 0, value);
  if (steps.length > POINTS_AT_MOST) {
    steps.splice(0, 1);
    values.splice(0, 1);
  }
}

class Plot {
  constructor(name) {
    this.name = name;
    this.figure = document.createElement("figure");
    this.figure.className = "plot";
    this.figure.dataset.metric = name;
    const caption = document.createElement("figcaption");
    const title = document.createElement("strong");
    const [source, ...rest] = name.split("/");
    this.title = rest.join("/");
    title.textContent = source === "loop" ? `${this.title} (loop)` : this.title;
    this.last = document.createElement("span");
    this.last.className = "last";
    caption.append(title, this.last);
    this.canvas = document.createElement("div");
    this.canvas.setAttribute("role", "img");
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = "As a table";
    this.table = document.createElement("div");
    this.table.tabIndex = 0;
    this.table.setAttribute("role", "region");
    this.table.setAttribute("aria-label", `${title.textContent}, the newest steps`);
    details.append(summary, this.table);
    details.addEventListener("toggle", () => this.tabulate());
    this.details = details;
    this.figure.append(caption, this.canvas, details);
    place.append(this.figure);
    this.make();
  }

  shown() {
    return runs.filter((run) => run.series[this.name]);
  }

  data() {
    return uPlot.join(this.shown().map((run) => [run.series[this.name].steps, run.series[this.name].values]));
  }

  make() {
    const ink = color("--soft");
    const axis = { stroke: ink, grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") } };
    this.ids = this.shown().map((run) => run.id).join();
    this.plot?.destroy();
    this.plot = new uPlot(
      {
        width: Math.max(160, this.canvas.clientWidth),
        height: 200,
        scales: { x: { time: false } },
        legend: { show: false },
        cursor: { drag: { x: true, y: false } },
        axes: [axis, { ...axis, size: 60 }],
        series: [
          { label: "step" },
          ...this.shown().map((run) => ({
            label: run.label,
            stroke: color(`--c${runs.indexOf(run) % 8}`),
            width: 1.5,
            spanGaps: runs.length > 1,
            points: { show: run.series[this.name].steps.length < 30 },
          })),
        ],
      },
      this.data(),
      this.canvas,
    );
    this.tell();
  }

  draw() {
    if (this.ids !== this.shown().map((run) => run.id).join()) this.make();
    this.plot.setData(this.data());
    this.tell();
  }

  tell() {
    const lines = this.shown().map((run) => {
      const { steps, values } = run.series[this.name];
      const what = runs.length > 1 ? `${run.label}: ` : "";
      return `${what}${told(values.at(-1))} at step ${steps.at(-1)}`;
    });
    this.last.textContent = runs.length > 1 ? "" : lines.join();
    const { steps, values } = this.shown()[0].series[this.name];
    this.figure.dataset.steps = steps.length;
    this.figure.dataset.step = String(steps.at(-1));
    this.figure.dataset.value = String(values.at(-1));
    this.canvas.setAttribute("aria-label", `${this.title}. ${lines.join("; ")}`);
    this.tabulate();
  }

  tabulate() {
    if (!this.details.open) return;
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const text of ["Step", ...this.shown().map((run) => run.label)]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = text;
      head.append(cell);
    }
    const body = table.createTBody();
    const [steps, ...columns] = this.data();
    for (let at = steps.length - 1; at >= Math.max(0, steps.length - TABLE_ROWS); at -= 1) {
      const row = body.insertRow();
      row.insertCell().textContent = steps[at];
      for (const column of columns) row.insertCell().textContent = column[at] === undefined ? "" : told(column[at]);
    }
    this.table.replaceChildren(table);
  }

  resize() {
    this.plot.setSize({ width: Math.max(160, this.canvas.clientWidth), height: 200 });
  }

  destroy() {
    this.plot.destroy();
  }
}

if (place) {
  // What comes while the first numbers are fetched is in these, or comes after them.
  let waiting = Promise.resolve();
  const then = (work) => (waiting = waiting.then(work).catch(failed));
  then(load);
  document.addEventListener("lorry:points", (event) => then(() => take(event.detail)));
  document.addEventListener("lorry:again", () => then(load));
  new ResizeObserver(() => plots.forEach((plot) => plot.resize())).observe(place);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plots.forEach((plot) => plot.make()));
}
