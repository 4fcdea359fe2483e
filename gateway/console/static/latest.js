// The newest step and loss of each run in a list.

const whole = new Intl.NumberFormat("en");
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });

document.addEventListener("lorry:points", (event) => {
  for (const { run, source, step, values } of event.detail) {
    if (source !== "training") continue;
    const row = document.querySelector(`tr[data-run="${CSS.escape(run)}"]`);
    if (!row) continue;
    const cells = { step: whole.format(step) };
    const loss = row.querySelector('[data-cell="loss"]')?.dataset.metric;
    if (loss in values) cells.loss = values[loss] === null ? "not finite" : number.format(values[loss]);
    for (const [name, text] of Object.entries(cells)) {
      const cell = row.querySelector(`[data-cell="${name}"]`);
      if (cell.textContent !== text) {
        cell.textContent = text;
        cell.classList.remove("fresh");
        void cell.offsetWidth;
        cell.classList.add("fresh");
      }
    }
  }
});
