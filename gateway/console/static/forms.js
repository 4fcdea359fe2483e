// Asks before what cannot be undone, and picks all of a list.

document.addEventListener("submit", (event) => {
  const question = event.submitter?.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
});

for (const button of document.querySelectorAll("button[data-pick]")) {
  button.addEventListener("click", () => {
    const boxes = [...button.form.elements].filter((box) => box.type === "checkbox" && box.name === button.dataset.pick);
    const all = boxes.every((box) => box.checked);
    for (const box of boxes) box.checked = !all;
  });
}
