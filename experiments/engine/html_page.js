"use strict";

// Boxes that scroll now can be reached by the keyboard; the others are no stop on its way.
const settle = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.scrollWidth > box.clientWidth) box.setAttribute("tabindex", "0");
    else box.removeAttribute("tabindex");
  }
};
settle();
addEventListener("resize", settle);
document.addEventListener("toggle", settle, true);

// Tables: a header's button sorts by its column: ascending, descending, as before.
const cellKey = (row, column) => {
  const text = row.cells[column].textContent.trim().replace("\u2212", "-");
  const number = text.match(/^[+-]?(\d[\d,]*)?\.?\d+(e[+-]?\d+)?(?=$|[\s%(])/i);
  return number ? { rank: 0, value: parseFloat(number[0].replaceAll(",", "")) } : { rank: text ? 1 : 2, value: text };
};
const compareKeys = (a, b) =>
  a.rank === 0 ? a.value - b.value : a.value.localeCompare(b.value, "en", { numeric: true });
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], original = [...body.rows], heads = [...table.tHead.rows[0].cells];
  if (original.length < 2) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = { ascending: "descending", descending: "" }[head.getAttribute("aria-sort")] ?? "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      const keyed = original.map((row) => [cellKey(row, column), row]);
      // Numbers stand before texts, and empty cells at the end, in both orders.
      if (order) keyed.sort(([a], [b]) => a.rank - b.rank || sign * compareKeys(a, b));
      body.append(...keyed.map(([, row]) => row));
    });
  });
}

// Images: each is a button that shows it large. Escape closes; the arrow keys show its neighbours.
const images = [...document.querySelectorAll("figure img")];
if (images.length) {
  const dialog = document.createElement("dialog"), large = document.createElement("img");
  const view = document.createElement("div"), text = document.createElement("p");
  const close = document.createElement("button");
  let shown = 0;
  const show = (number) => {
    shown = (number + images.length) % images.length;
    large.src = images[shown].src;
    large.alt = images[shown].alt;
    text.textContent = images[shown].alt;
    view.replaceChildren(large);
    // What is larger than the page shows it is panned in its full size.
    large.classList.toggle("whole", images[shown].naturalWidth > 600);
  };
  large.addEventListener("load", () =>
    view.scrollTo((view.scrollWidth - view.clientWidth) / 2, (view.scrollHeight - view.clientHeight) / 2));
  view.className = "view";
  view.tabIndex = 0;
  text.id = "enlarged";
  dialog.setAttribute("aria-labelledby", text.id);
  close.type = "button";
  close.textContent = "Close";
  close.autofocus = true;
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && !(event.target === view && large.className)) show(shown + step);
  });
  dialog.append(view, text, close);
  document.body.append(dialog);
  images.forEach((image, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "enlarge";
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => {
      dialog.showModal();
      show(number);
    });
  });
}
