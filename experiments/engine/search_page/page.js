// The page to search in. The address after # says what is shown, so that Back walks back:
//   #/                          the images, ?class= of a class, ?right_only_in= where two runs differ
//   #/image/NUMBER, #/sent/N    the nearest of an image, or of a picture that was dropped here
// Names of files are shown as text alone, never as HTML.

import { arrowKeys, virtualGrid } from "./grid.js";
import { address, ask, breakable, el, many, pause, picture, sentence } from "./parts.js";

const KS = [10, 20, 50, 100, 200];
const CLASSES_SHOWN = 200;
const TRAIL = 12;
const LOOK_SECONDS = 15;

const byId = (id) => document.getElementById(id);
const view = byId("view"), notice = byId("notice"), filter = byId("filter");

let collection = null; // what GET /api/collection said
let turn = 0; // grows with each view, so that a late answer is dropped
let endView = () => {};
let entry = null, hasCome = false; // the entry of the browser's history; whether it is shown
let trail = []; // the images that were walked over
const left = new Map(); // entry of the history: where it was left, to come back to
const sent = []; // pictures that were dropped here; the server does not keep them

const asked = (path, parameters, options) =>
  ask(path, { collection: collection.id, ...parameters }, options);

// ---- pictures

const thumbnail = (item) =>
  picture(`/thumbnails/${item.number}?v=${encodeURIComponent(item.v)}`, item.name);

const imageAddress = (item, state = {}) =>
  address(`image/${item.number}`, {
    k: state.k ?? null, class: state.class ?? null, of: collection.id });

function tile(item, state, ...caption) {
  const about = [item.class, item.name].filter(Boolean).join("\n");
  return el("a", { className: "tile", href: imageAddress(item, state), title: about },
    el("span", { className: "frame" }, thumbnail(item)),
    el("span", { className: "caption" }, ...caption,
      item.class === null ? null : el("span", { className: "class" }, item.class),
      el("span", { className: "path" }, ...breakable(item.name))));
}

function foundTile(item, state, isCompared) {
  const filled = el("span");
  filled.style.width = `${Math.max(0, 100 * item.similarity)}%`;
  const made = tile(item, state, el("span", { className: "similarity" },
    item.similarity.toFixed(3), el("span", { className: "bar" }, filled)));
  const frame = made.querySelector(".frame");
  if (item.same_class) {
    frame.append(el("span", { className: "badge", title: "of the same class" }, "✓",
      el("span", { className: "skip" }, " same class")));
  }
  if (isCompared && !item.common) {
    made.classList.add("alone");
    frame.append(el("span", { className: "badge only" }, "only here"));
  }
  return made;
}

/** Marks the image that is pointed at in the list of the other run, too. */
function markTwins(event) {
  const href = event.target.closest("a.tile")?.getAttribute("href");
  for (const other of view.querySelectorAll(".runs.two a.tile")) {
    other.classList.toggle("twin", other.getAttribute("href") === href);
  }
}

// ---- views

function start(title) {
  endView();
  endView = () => {};
  notice.textContent = "";
  document.title = `${title} – ${collection.folder}`;
  return ++turn;
}

/** A sentence in the place of what cannot be shown. */
function showFailure(error) {
  notice.textContent = "";
  view.replaceChildren(el("h1", {}, "No result"),
    el("div", { className: "query" }, sentence(error.message)),
    el("a", { className: "chip", href: "#/" }, "All images"));
}

/** The images of the collection, of a class, or where the runs differ. */
async function showImages(state) {
  const mine = start(state.class ?? "Images");
  const parameters = { class: state.class, right_only_in: state.right_only_in };
  let first = await asked("/api/images", { ...parameters, limit: 0 });
  while (first.progress !== undefined) {
    if (mine !== turn) return;
    notice.textContent = `Comparing the runs: ${Math.round(100 * first.progress)} %`;
    await pause(400);
    first = await asked("/api/images", { ...parameters, limit: 0 });
  }
  if (mine !== turn) return;
  notice.textContent = "";
  const list = el("ul", { "aria-label": "Images" });
  view.replaceChildren(...(differenceTabs(state) ?? []),
    el("div", { className: "head" }, el("h1", { tabIndex: -1 }, imagesTitle(state, first.total)),
      state.class === null ? null : classChip(state, "images"),
      el("p", { className: "quiet" }, first.total
        ? "Click one to see the nearest, or drop or paste a picture of your own." : "")),
    list);
  const load = async (offset, limit) =>
    (await asked("/api/images", { ...parameters, offset, limit })).images;
  const empty = () => el("span", { className: "tile" }, el("span", { className: "frame" }));
  const grid = virtualGrid(list, first.total, load,
    (item) => (item ? tile(item, { class: null }) : empty()),
    (error) => tell(error.message), left.get(entry)?.place ?? 0);
  const mineEntry = entry;
  endView = () => {
    remember({ place: grid.place() }, mineEntry);
    grid.end();
  };
  comeBack();
}

function imagesTitle(state, total) {
  const what = many(total, "image") + (state.class === null ? "" : ` of ${state.class}`);
  if (state.right_only_in === null) return what;
  const [right, wrong] = [state.right_only_in, 1 - state.right_only_in];
  return `${what} whose nearest has the right class in ${collection.runs[right].name}, ` +
    `not in ${collection.runs[wrong].name}`;
}

function differenceTabs(state) {
  if (collection.runs.length < 2 || !collection.classes.length) return null;
  const tab = (text, only) => {
    const link = el("a", { className: "chip", href: address("", {
      class: state.class, right_only_in: only }) }, text);
    if (state.right_only_in === only) link.setAttribute("aria-current", "true");
    return link;
  };
  return [el("div", { className: "tabs" }, tab("All images", null),
    ...collection.runs.map((run, at) => tab(`Right only in ${run.name}`, at)))];
}

function classChip(state, path) {
  const href = address(path === "images" ? "" : path, { ...state, class: null });
  return el("a", { className: "chip", href, title: "Search all classes again" },
    state.class, el("span", { "aria-hidden": "true" }, "✕"));
}

/** The nearest of an image of the collection, or of a picture that was sent. */
async function showNearest(state) {
  const isSent = state.path.startsWith("sent/");
  const mine = start("Nearest images");
  const parameters = { k: state.k, class: state.class };
  notice.textContent = "Searching …";
  let found;
  try {
    if (isSent) found = await askForSent(state, parameters);
    else found = await asked(`/api/nearest/${state.number}`, { ...parameters, collection: state.of });
  } catch (error) {
    if (mine !== turn) return;
    showFailure(error);
    return;
  }
  if (mine !== turn) return;
  notice.textContent = "";
  if (!isSent) walk(found.query);
  const name = isSent ? sent[state.number].name : found.query.name;
  const title = el("h1", { tabIndex: -1 }, ...breakable(name));
  view.replaceChildren(trailList(found.query), queryPanel(state, found, title), results(state, found));
  document.title = `${name} – ${collection.folder}`;
  title.focus({ preventScroll: true });
  comeBack();
}

function askForSent(state, parameters) {
  const file = sent[state.number];
  if (!file) throw new Error("A dropped picture is not kept: drop it again.");
  const most = collection.limits.bytes;
  if (file.size > most) {
    throw new Error(`${file.name} has ${Math.ceil(file.size / 1e6)} MB, more than the ` +
      `${most / 1e6} MB that are taken.`);
  }
  return asked("/api/nearest", parameters, { method: "POST", body: file });
}

function walk(item) {
  const at = trail.findIndex((other) => other.number === item.number);
  trail = at < 0 ? [...trail, item].slice(-TRAIL) : trail.slice(0, at + 1);
}

function trailList(item) {
  if (trail.length < 2) return el("span");
  const links = trail.map((each) => {
    const link = el("a", { href: imageAddress(each), title: each.name }, thumbnail(each));
    if (each.number === item.number) link.setAttribute("aria-current", "true");
    return link;
  });
  return el("nav", { className: "trail", "aria-label": "The way here" }, ...links);
}

function queryPanel(state, found, title) {
  const item = found.query, isSent = item.number === undefined;
  const source = isSent ? null : `/images/${item.number}?v=${encodeURIComponent(item.v)}`;
  const frame = isSent
    ? el("div", { className: "frame" }, picture(item.thumbnail, "The picture that you sent", false))
    : el("a", { className: "frame", href: source, target: "_blank", title: "See it in full" },
      picture(source, item.name, false));
  const kinds = el("select", { id: "k" },
    ...[...new Set([...KS, state.k])].sort((a, b) => a - b).map((k) => el("option", { value: k, selected: k === state.k }, k)));
  kinds.addEventListener("change", () => {
    location.hash = address(state.path, { k: kinds.value, class: state.class, of: state.of });
  });
  const lines = [title];
  if (isSent) lines.push(el("p", { className: "quiet" }, `${item.width} × ${item.height} pixels`));
  else if (item.class !== null) {
    lines.push(el("p", {}, "Class ", el("a", { className: "chip",
      href: address("", { class: item.class }) }, item.class)));
  }
  if (found.agree !== null) {
    const most = Math.max(...found.runs.map((run) => run.images.length));
    lines.push(el("p", { id: "agree" }, `The runs agree on ${found.agree} of the first ${most}.`));
  }
  const only = state.class === null ? null
    : classChip({ k: state.k, class: state.class, of: state.of }, state.path);
  lines.push(el("div", { className: "controls" },
    el("label", {}, "Nearest", kinds), only && el("span", { className: "quiet" }, "among"), only));
  return el("div", { className: "query" }, frame, el("div", { className: "facts" }, ...lines));
}

const classSize = (name) => collection.classes.find((each) => each.name === name)?.count ?? 0;

function results(state, found) {
  const isCompared = found.runs.length > 1;
  const sections = found.runs.map((run) => {
    const list = el("ul", { className: "results", "aria-label": "Nearest images" },
      ...run.images.map((item) => el("li", {}, foundTile(item, state, isCompared))));
    arrowKeys(list);
    list.addEventListener("mouseover", markTwins);
    list.addEventListener("focusin", markTwins);
    const others = classSize(found.query.class) - 1;
    const isOther = state.class !== null && state.class !== found.query.class;
    const right = others < 1 || isOther ? ""
      : `✓ ${run.same_class} of the ${many(others, "other")} of its class`;
    const name = isCompared ? el("h2", {}, collection.runs[run.run].name) : null;
    const none = run.images.length ? null : el("p", { className: "quiet" }, "No other image.");
    return el("section", {},
      el("div", { className: "run-head" }, name, el("p", { className: "quiet" }, right)), none, list);
  });
  return el("div", { className: isCompared ? "runs two" : "runs" }, ...sections);
}

// ---- where we are

function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const given = new URLSearchParams(query);
  const number = (name) => (/^\d+$/.test(given.get(name) ?? "") ? Number(given.get(name)) : null);
  return { path, number: path.split("/")[1], class: given.get("class"), k: number("k") ?? 20,
    right_only_in: number("right_only_in"), of: given.get("of") };
}

const remember = (what, of = entry) => left.set(of, { ...left.get(of), ...what });

/** Scrolls to where this entry of the history was left. */
function comeBack() {
  hasCome = true;
  window.scrollTo(0, left.get(entry)?.scroll ?? 0);
}

async function show() {
  entry = history.state?.entry ?? `${Date.now()} ${turn}`;
  history.replaceState({ entry }, "");
  hasCome = false;
  const state = place();
  drawClasses(state);
  try {
    await (/^(image|sent)\/\d+$/.test(state.path) ? showNearest(state) : showImages(state));
  } catch (error) {
    showFailure(error);
  }
}

// ---- classes

function drawClasses(state = place()) {
  byId("classes").hidden = !collection.classes.length;
  const wanted = filter.value.trim().toLowerCase();
  const matching = collection.classes.filter(({ name }) => name.toLowerCase().includes(wanted));
  const chosen = matching.filter(({ name }) => name === state.class);
  const rest = matching.filter(({ name }) => name !== state.class);
  const shown = [...chosen, ...rest].slice(0, CLASSES_SHOWN);
  const rows = shown.map(({ name, count }) => {
    const button = el("button", { type: "button", title: name, "aria-pressed": name === state.class },
      el("span", {}, name), " ", el("span", {}, count.toLocaleString("en")));
    button.addEventListener("click", () => chooseClass(name === state.class ? null : name));
    return el("li", {}, button);
  });
  const more = matching.length - shown.length;
  const text = !matching.length ? "No class has this in its name."
    : more ? `${more.toLocaleString("en")} more: type to narrow` : "";
  byId("class-list").replaceChildren(...rows, text && el("li", {}, el("p", {}, text)));
}

/** Filters what is shown by a class; null: all classes. */
function chooseClass(name) {
  const state = place();
  byId("classes").classList.remove("open");
  filter.value = "";
  byId("main").focus({ preventScroll: true });
  const kept = state.path ? { k: state.k, of: state.of } : { right_only_in: state.right_only_in };
  location.hash = address(state.path, { ...kept, class: name });
}

filter.addEventListener("input", () => drawClasses());
filter.addEventListener("focus", () => byId("classes").classList.add("open"));
document.addEventListener("pointerdown", (event) => {
  if (!byId("classes").contains(event.target)) byId("classes").classList.remove("open");
});
byId("classes").addEventListener("keydown", (event) => {
  const stops = [filter, ...byId("class-list").querySelectorAll("button")];
  const at = stops.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1 }[event.key];
  if (event.key === "Enter" && at === 0 && stops.length > 1) stops[1].click();
  else if (event.key === "Escape") leaveFilter(event);
  else if (at >= 0 && to >= 0 && to < stops.length) {
    event.preventDefault();
    stops[to].focus();
  }
});

function leaveFilter(event) {
  event.stopPropagation();
  const wasEmpty = !filter.value && place().class === null;
  filter.value = "";
  byId("classes").classList.remove("open");
  drawClasses();
  if (place().class !== null) chooseClass(null);
  if (wasEmpty) filter.blur();
}

// ---- pictures of one's own

function send(file) {
  if (!file) return;
  sent.push(file);
  location.hash = address(`sent/${sent.length - 1}`);
}

byId("choose").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", (event) => {
  send(event.target.files[0]);
  event.target.value = "";
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files][0];
  if (file) send(file);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").hidden = true;
  const file = event.dataTransfer.files[0];
  if (file) send(file);
  else tell("That was no file: drop a picture from your computer.");
});

// ---- keys

document.addEventListener("keydown", (event) => {
  const isTyping = ["INPUT", "SELECT"].includes(document.activeElement?.tagName);
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const onTile = document.activeElement?.closest(".tile");
  if (event.key === "/" && collection.classes.length) {
    event.preventDefault();
    filter.focus();
  } else if (event.key === "Escape" && place().path) {
    location.hash = address("", { class: place().class });
  } else if (event.key === "Escape" && place().class !== null) {
    chooseClass(null);
  } else if (["ArrowLeft", "ArrowRight"].includes(event.key) && !onTile) {
    (view.querySelector("a.tile[tabindex='0']") ?? view.querySelector("a.tile"))?.focus();
  }
});

// ---- the collection, and its changes

function tell(text) {
  notice.textContent = text;
}

function about() {
  const { folder, count, classes, runs, unreadable } = collection;
  byId("folder").textContent = folder.split("/").filter(Boolean).at(-1) ?? folder;
  byId("folder").title = folder;
  const parts = [many(count, "image"), many(classes.length, "class", "classes"),
    runs.map((run) => `${run.name}, step ${run.step}`).join(" and ")];
  if (unreadable) parts.push(`${unreadable} cannot be read`);
  byId("about").textContent = parts.join(" · ");
  byId("about").title = byId("about").textContent;
}

async function look() {
  let now;
  try {
    now = await ask("/api/collection");
  } catch {
    return null; // the next click says so
  }
  if (now.id !== collection.id) {
    tell("The collection is another one by now: load the page again.");
    return now;
  }
  const hasChanged = now.version !== collection.version;
  if (now.problem && now.looks !== collection.looks) tell(`The update failed: ${now.problem}`);
  collection = now;
  if (!hasChanged) return now;
  about();
  const state = place();
  if (state.path) drawClasses(state); // what was found stays as it was
  else await show();
  tell(`The files have changed: ${many(now.count, "image")} now.`);
  return now;
}

byId("update").addEventListener("click", async () => {
  const { version } = collection;
  tell("Looking for changed files …");
  try {
    const { look: asked } = await ask("/api/update", {}, { method: "POST" });
    let now;
    do {
      await pause(300);
      now = await look();
    } while (now && now.looks < asked);
    if (now && !now.problem && now.version === version) tell("No file has changed.");
  } catch (error) {
    tell(error.message);
  }
});

setInterval(() => document.hidden || look(), 1000 * LOOK_SECONDS);
window.addEventListener("hashchange", show);
window.addEventListener("scroll", () => hasCome && remember({ scroll: window.scrollY }),
  { passive: true });
history.scrollRestoration = "manual"; // a view is drawn when the server has answered

try {
  collection = await ask("/api/collection");
  about();
  await show();
} catch (error) {
  view.replaceChildren(sentence(error.message));
}
