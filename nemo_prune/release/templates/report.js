"use strict";
const value = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim().toLowerCase() : Number(cell.dataset.value);
};
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th"), body = button.closest("table").tBodies[0];
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a, header.cellIndex), y = value(b, header.cellIndex);
      return (x < y ? -1 : x > y ? 1 : 0) * (descending ? -1 : 1);
    });
    body.append(...rows);
  });
}
for (const field of document.querySelectorAll("input[data-filters]")) {
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const entry of document.querySelectorAll(field.dataset.filters)) {
      entry.hidden = !entry.textContent.toLowerCase().includes(wanted);
    }
  });
}
const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll(".strip button")) {
  button.addEventListener("click", () => {
    const shown = button.querySelector("img"), large = dialog.querySelector("img");
    large.src = shown.src;
    large.alt = shown.alt;
    dialog.querySelector("p").textContent = shown.alt;
    dialog.showModal();
  });
}
dialog.querySelector("button").addEventListener("click", () => dialog.close());
