"use strict";
// Numbers before words before what is missing, whichever way a column is sorted; "seed 2" before "seed 10".
const words = new Intl.Collator("en", { numeric: true });

function place(row, column) {
  const cell = row.cells[column];
  if ("missing" in cell.dataset) return { rank: 2 };
  if ("number" in cell.dataset) return { rank: 0, number: Number(cell.dataset.number) };
  return { rank: 1, text: (cell.querySelector("summary") ?? cell).textContent.trim() };
}

function compare(one, other) {
  return one.rank === 0 ? one.number - other.number : one.rank === 1 ? words.compare(one.text, other.text) : 0;
}

function sort(heading) {
  const body = heading.closest("table").tBodies[0];
  const direction = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  const rows = Array.from(body.rows, (row) => [place(row, heading.cellIndex), row]);
  rows.sort(([one], [other]) => one.rank - other.rank || sign * compare(one, other));
  body.append(...rows.map(([, row]) => row));
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}
