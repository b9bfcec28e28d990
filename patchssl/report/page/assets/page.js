"use strict";
(() => {
  const pictures = JSON.parse(document.getElementById("pictures").textContent);

  // pictures are decoded when a query is opened, not before
  document.addEventListener("toggle", (event) => {
    if (!event.target.open || !event.target.matches("details.query")) return;
    for (const image of event.target.querySelectorAll("img[data-picture]:not([src])")) {
      image.src = pictures[Number(image.dataset.picture)];
    }
  }, true);

  const keyOf = (row, column, numeric) => {
    const cell = row.cells[column];
    if (!numeric) return cell.textContent.trim();
    return cell.dataset.key === undefined ? null : Number(cell.dataset.key);
  };

  const sort = (button) => {
    const header = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
    const numeric = header.classList.contains("num"), column = Number(button.dataset.column);
    const now = header.getAttribute("aria-sort");
    const next = now === "none" ? (numeric ? "descending" : "ascending")
                                : now === "ascending" ? "descending" : "ascending";
    for (const other of header.parentElement.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((row) => [keyOf(row, column, numeric), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);  // what has no number comes last
      return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
    });
    body.append(...rows.map(([, row]) => row));
  };

  const filter = (field) => {
    const place = document.getElementById(field.dataset.filter);
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const items = [...place.querySelectorAll(".filtered")];
    let shown = 0;
    for (const item of items) {
      const parts = item.cells ? [...item.cells] : [item.querySelector("summary")];
      const own = parts.map((part) => part.textContent).join(" ");
      item.hidden = !words.every((word) => own.toLowerCase().includes(word));
      shown += !item.hidden;
    }
    const count = document.querySelector(`[data-count="${field.dataset.filter}"]`);
    count.textContent = words.length ? `${shown} of ${items.length}` : "";
  };

  for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button));
  for (const field of document.querySelectorAll("input[data-filter]")) {
    field.addEventListener("input", () => filter(field));
    if (field.value) filter(field);  // a reloaded page keeps what was typed
  }

  const theme = document.getElementById("theme"), names = { auto: "as the system", light: "light", dark: "dark" };
  const order = Object.keys(names);
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = order[(order.indexOf(document.documentElement.dataset.theme || "auto") + 1) % order.length];
    document.documentElement.dataset.theme = next;
    theme.textContent = `Colors: ${names[next]}`;
  });
})();
