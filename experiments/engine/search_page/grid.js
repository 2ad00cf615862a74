// Lists of pictures: a grid of any length that holds only what is seen, and the arrow keys.

const GAP = 12; // pixels, as --gap in style.css
const CAPTION = 44; // pixels below a picture
const PAGE = 120; // images that are asked for at once
const AHEAD = 3; // rows above and below what is seen

/**
 * Shows a list of any length in `list` as it is scrolled to.
 *
 * @param {HTMLUListElement} list where the pictures go.
 * @param {number} total how many there are.
 * @param {(offset: number, limit: number) => Promise<object[]>} load asks for some of them.
 * @param {(item: object) => HTMLElement} tile shows one; null while it is loaded.
 * @param {(error: Error) => void} failed is told why some cannot be loaded.
 * @param {number} current the place that Tab leads to.
 * @returns {{end: () => void, place: () => number}} ends it; tells the place that Tab leads to.
 */
export function virtualGrid(list, total, load, tile, failed, current) {
  const pages = new Map(); // number of the page: its items, or null while they come
  const shown = new Map(); // place: its <li>
  let columns = 1, width = 0, height = 1, ended = false, waiting = false, wanted = null;
  list.className = "virtual";

  function layout() {
    const wide = list.clientWidth;
    const least = wide < 500 ? 98 : 138;
    columns = Math.max(1, Math.floor((wide + GAP) / (least + GAP)));
    width = Math.floor((wide - GAP * (columns - 1)) / columns);
    height = width + CAPTION + GAP;
    list.style.height = `${Math.ceil(total / columns) * height}px`;
    for (const [place, li] of shown) put(li, place);
    draw();
  }

  function put(li, place) {
    const x = (place % columns) * (width + GAP), y = Math.floor(place / columns) * height;
    li.style.transform = `translate(${x}px, ${y}px)`;
    li.style.width = `${width}px`;
  }

  async function fetchPage(number) {
    pages.set(number, null);
    try {
      const items = await load(number * PAGE, PAGE);
      if (ended) return;
      pages.set(number, items);
      for (const [place, li] of shown) if (Math.floor(place / PAGE) === number) fill(li, place);
    } catch (error) {
      pages.delete(number); // the next scroll asks again
      if (!ended) failed(error);
    }
  }

  function fill(li, place) {
    const item = pages.get(Math.floor(place / PAGE))?.[place % PAGE] ?? null;
    const had = li.contains(document.activeElement);
    li.replaceChildren(tile(item));
    const link = li.querySelector("a");
    if (!link) return;
    link.tabIndex = place === current ? 0 : -1;
    if (had || place === wanted) link.focus({ preventScroll: true });
    if (place === wanted) wanted = null;
  }

  function draw() {
    waiting = false;
    if (ended) return;
    const top = -list.getBoundingClientRect().top;
    const first = Math.max(0, (Math.floor(top / height) - AHEAD) * columns);
    const rows = Math.ceil(window.innerHeight / height) + 2 * AHEAD + 1;
    const last = Math.min(total, first + rows * columns);
    for (const [place, li] of shown) {
      if ((place < first || place >= last) && place !== current) {
        li.remove();
        shown.delete(place);
      }
    }
    const seen = new Set();
    for (let place = first; place < last; place++) {
      seen.add(Math.floor(place / PAGE));
      if (!shown.has(place)) show(place);
    }
    for (const number of seen) if (!pages.has(number)) fetchPage(number);
  }

  function show(place) {
    const li = document.createElement("li");
    li.setAttribute("aria-setsize", total);
    li.setAttribute("aria-posinset", place + 1);
    put(li, place);
    shown.set(place, li);
    const next = [...shown.keys()].filter((other) => other > place).sort((a, b) => a - b)[0];
    list.insertBefore(li, next === undefined ? null : shown.get(next));
    fill(li, place);
  }

  function focus(place) {
    const before = shown.get(current)?.querySelector("a");
    if (before) before.tabIndex = -1;
    current = place;
    if (!shown.has(place)) show(place);
    const row = Math.floor(place / columns) * height + list.getBoundingClientRect().top;
    if (row < 70) window.scrollBy(0, row - 70);
    if (row + height > window.innerHeight) window.scrollBy(0, row + height - window.innerHeight);
    const link = shown.get(place).querySelector("a");
    wanted = link ? null : place; // it gets the focus when it has come
    if (link) {
      link.tabIndex = 0;
      link.focus({ preventScroll: true });
    }
    draw();
  }

  function onKey(event) {
    const to = target(event, current, columns, total);
    if (to === null || !list.contains(document.activeElement)) return;
    event.preventDefault();
    focus(to);
  }

  function onFocus(event) {
    for (const [place, li] of shown) if (li.contains(event.target)) current = place;
  }

  const soon = () => {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  };
  const watcher = new ResizeObserver(layout);
  watcher.observe(list);
  list.addEventListener("keydown", onKey);
  list.addEventListener("focusin", onFocus);
  window.addEventListener("scroll", soon, { passive: true });
  layout();
  const end = () => {
    ended = true;
    watcher.disconnect();
    window.removeEventListener("scroll", soon);
  };
  return { end, place: () => current };
}

/** Moves the focus among the links of a list that is shown in full, by the arrow keys. */
export function arrowKeys(list) {
  list.addEventListener("keydown", (event) => {
    const links = [...list.querySelectorAll("a.tile")];
    const at = links.indexOf(document.activeElement);
    if (at < 0) return;
    const top = links[0].getBoundingClientRect().top;
    const columns = links.filter((link) => link.getBoundingClientRect().top === top).length;
    const to = target(event, at, columns, links.length);
    if (to === null) return;
    event.preventDefault();
    links[to].focus();
  });
}

/** The place that a key leads to from another; null where it leads nowhere. */
function target(event, at, columns, total) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return null;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  if (event.key === "Home") return 0;
  if (event.key === "End") return total - 1;
  const to = at + (steps[event.key] ?? 0);
  return event.key in steps && to >= 0 && to < total ? to : null;
}
