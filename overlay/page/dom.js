// Words, numbers and nodes. Texts of others become text and nothing else: no function here takes markup.

export const ORDER = ["down", "degraded", "unknown", "healthy"];
export const WORDS = { down: "down", degraded: "degraded", unknown: "not measured", healthy: "healthy" };

export const $ = (id) => document.getElementById(id);

/** An element with properties (`class`, `data-*` and `aria-*` are attributes) and children, which are nodes or text. */
export function el(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function filled(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

/** The data in a JSON text. What would hide in other texts, or turn them round, becomes visible. */
export const parsed = (text) =>
  JSON.parse(text, (_, value) => (typeof value === "string" ? value.replace(UNSEEN, "\ufffd") : value));

/** Set the text, if it is another: what has not changed is not read out again. */
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Make `parent` hold a node for each item, in order; those that are there already stay, with focus and selection. */
export function sync(parent, items, keyOf, make, update) {
  const old = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  const times = new Map();
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = keyOf(item);
    times.set(name, (times.get(name) ?? 0) + 1);
    const key = `${times.get(name)} ${name}`;
    let node = old.get(key);
    if (node === undefined) {
      node = make(item);
      node.dataset.key = key;
    }
    old.delete(key);
    if (node === next) next = next.nextElementSibling;
    else parent.insertBefore(node, next);
    update?.(node, item);
  }
  for (const node of old.values()) node.remove();
}

/** A shape, a colour and a word. */
export const mark = (health, text = WORDS[health]) => el("span", { class: `mark ${health}` }, text);

export const called = (host) => host.name || host.subnets?.[0] || host.key;

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/** `4 s`, `3 min`, `5 h`, `2 d`. */
export function span(seconds) {
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  if (seconds < 5940) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

export const NOTHING = "–";

export const ago = (seconds) => (Number.isFinite(seconds) ? `${span(seconds)} ago` : NOTHING);

export function rtt(ms) {
  if (ms === null || ms === undefined) return NOTHING;
  return ms < 1 ? ms.toFixed(2) : ms < 10 ? ms.toFixed(1) : Math.round(ms).toLocaleString("en");
}

export const percent = (part) =>
  part === null || part === undefined ? NOTHING : `${Number((100 * part).toFixed(part < 0.1 ? 1 : 0))} %`;

/** The name of a cause, or of an event, for people. */
export const spoken = (name) => name.replaceAll("_", " ");

/** Text in which backticks set off commands. */
export const withCode = (text) =>
  text.split("`").map((part, number) => (number % 2 ? el("code", {}, part) : document.createTextNode(part)));

/** Subnets in their order, whatever the hosts' names and health: a place in the picture is kept. */
export const bySubnet = (hosts) =>
  [...hosts].sort((one, other) => one.key.localeCompare(other.key, "en", { numeric: true }));

/** The worse of two. */
export const worse = (one, other) => (ORDER.indexOf(other) < ORDER.indexOf(one) ? other : one);

/** Paths of the document by "from to", each as an object; from and to are places in `[here, ...hosts]`. */
export function pathsOf(picture) {
  const found = new Map();
  for (const [from, to, health, rtt_ms, loss, mtu, cause, ago_s] of picture.pairs) {
    found.set(`${from} ${to}`, { health, rtt_ms, loss, mtu, cause, ago_s });
  }
  return found;
}

/** One path in words. */
export function told(path) {
  if (!path) return "not measured";
  if (path.health === "down") return path.cause ? spoken(path.cause) : "nothing comes back";
  const parts = [path.cause && spoken(path.cause), `${rtt(path.rtt_ms)} ms`, `loss ${percent(path.loss)}`];
  return [...parts, path.mtu && `${path.mtu} bytes pass`, ago(path.ago_s)].filter(Boolean).join(", ");
}
