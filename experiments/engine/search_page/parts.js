// What the page is made of: questions to the server, and elements. Text is never taken as HTML.

/** Asks the server; an Error is a sentence. */
export async function ask(path, parameters = {}, options = {}) {
  const url = new URL(path, location.origin);
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined) url.searchParams.set(name, value);
  }
  let response, body;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  try {
    body = await response.json();
  } catch {
    throw new Error("The server's answer cannot be read.");
  }
  if (!response.ok) throw new Error(body.error ?? "The server failed.");
  return body;
}

export const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export const many = (count, one, more = `${one}s`) =>
  `${count.toLocaleString("en")} ${count === 1 ? one : more}`;

/** A path that may be broken behind its signs. */
export const breakable = (path) =>
  path.split(/(?<=[/_.-])/).flatMap((part, at) => (at ? [el("wbr"), part] : [part]));

export const sentence = (text) => el("p", { className: "sentence", role: "alert" }, text);

export function address(path, parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null);
  const query = new URLSearchParams(given).toString();
  return `#/${path}${query && `?${query}`}`;
}

/** A picture; a sentence in its place where the server cannot send it. */
export function picture(source, alt, lazy = true) {
  const image = el("img", { alt, draggable: false, decoding: "async" });
  if (lazy) image.loading = "lazy";
  image.addEventListener("error", async () => {
    const why = await ask(source).catch((error) => error.message);
    const text = typeof why === "string" ? why : "The picture cannot be shown.";
    image.replaceWith(el("span", { className: "lost" }, text));
  });
  image.src = source;
  return image;
}
