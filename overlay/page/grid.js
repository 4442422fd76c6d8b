// Any number of hosts as cells, worst first. Where each is follows from how many there are of each kind, so the map
// needs no data on most of them; who a host is is asked when it is looked at.

import { ORDER, WORDS, called, count, el, write } from "./dom.js";

const HEIGHT = 420;
const SMALLEST = 4;
const LARGEST = 26;
const SHAPED = 9;

/** What is drawn, and where the keyboard is in it. */
const map = { cells: [], columns: 1, size: 1, cursor: 0, picture: null, choose: null };

export function showGrid(place, picture, counts, chosen, choose) {
  if (!place.querySelector("canvas")) place.replaceChildren(canvas(), el("p", { class: "quiet", "aria-live": "polite" }));
  const [drawn, said] = place.children;
  const own = picture.here && (!picture.search || picture.search.here) ? [picture.here.health] : [];
  map.cells = [...own];
  for (const health of counts ? ORDER : []) map.cells.push(...Array(counts[health]).fill(health));
  Object.assign(map, { picture, choose, own: own.length });
  map.cursor = Math.min(map.cursor, Math.max(0, map.cells.length - 1));
  const parts = ORDER.map((health) => `${counts?.[health] ?? 0} ${WORDS[health]}`).join(", ");
  drawn.setAttribute("aria-label", `Map of ${count(map.cells.length, "host")}, worst first: ${parts}. Arrow keys move.`);
  draw(drawn, chosen);
  say(said);
}

function canvas() {
  const drawn = el("canvas", { tabIndex: 0, role: "application", "aria-roledescription": "map of hosts" });
  const said = () => drawn.nextElementSibling;
  const at = (event) => {
    const column = Math.floor(event.offsetX / map.size);
    const place = Math.floor(event.offsetY / map.size) * map.columns + column;
    return column < map.columns && place < map.cells.length ? place : -1;
  };
  const go = (place) => {
    map.cursor = Math.min(Math.max(0, place), map.cells.length - 1);
    draw(drawn, null);
    say(said());
  };
  drawn.addEventListener("mousemove", (event) => {
    const place = at(event);
    drawn.title = place < 0 ? "" : name(place);
  });
  drawn.addEventListener("click", (event) => {
    if (at(event) < 0) return;
    go(at(event));
    map.choose(map.cursor);
  });
  drawn.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: map.columns, ArrowUp: -map.columns };
    if (event.key in steps) go(map.cursor + steps[event.key]);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(map.cells.length - 1);
    else if (event.key === "Enter" || event.key === " ") map.choose(map.cursor);
    else return;
    event.preventDefault();
  });
  drawn.addEventListener("focus", () => draw(drawn, null));
  drawn.addEventListener("blur", () => draw(drawn, null));
  return drawn;
}

/** The host at a place, if it is among those listed. */
function known(place) {
  if (place < map.own) return map.picture.here;
  return map.picture.hosts[place - map.own - map.picture.start];
}

function name(place) {
  const host = known(place);
  const health = WORDS[map.cells[place]];
  if (!host) return `${health}, ${(place + 1).toLocaleString("en")} of ${count(map.cells.length, "host")}: Enter or a click shows it`;
  return `${called(host)} ${host.subnets.join(" ")}, ${health}`;
}

const say = (node) => write(node, map.cells.length ? name(map.cursor) : "No host is found.");

let last = "";

function draw(drawn, chosen) {
  last = chosen ?? last;
  const { cells } = map;
  const width = drawn.clientWidth;
  const fit = Math.floor(Math.sqrt((width * HEIGHT) / Math.max(1, cells.length)));
  const size = (map.size = Math.min(LARGEST, Math.max(SMALLEST, fit)));
  const columns = (map.columns = Math.max(1, Math.floor(width / size)));
  const height = Math.max(1, Math.ceil(cells.length / columns)) * size;
  const scale = devicePixelRatio;
  Object.assign(drawn, { width: width * scale, height: height * scale });
  const pen = drawn.getContext("2d");
  pen.scale(scale, scale);
  const colours = coloursNow(drawn);
  const gap = size > 6 ? 2 : 1;
  cells.forEach((health, place) => {
    const [x, y] = [(place % columns) * size, Math.floor(place / columns) * size];
    pen.fillStyle = pen.strokeStyle = colours[health];
    cell(pen, health, x + gap / 2, y + gap / 2, size - gap);
  });
  const listed = cells.findIndex((_, place) => known(place)?.key === last);
  if (listed >= 0) frame(pen, listed, colours.ink, 2);
  if (drawn === document.activeElement && cells.length) frame(pen, map.cursor, colours.ink, 3);
}

/** A shape for each kind where there is room for it; in the smallest cells what is down stands out by its size. */
function cell(pen, health, x, y, size) {
  if (size + 2 < SHAPED) {
    const inset = health === "unknown" ? size / 4 : health === "healthy" ? 0.5 : 0;
    pen.fillRect(x + inset, y + inset, size - 2 * inset, size - 2 * inset);
    return;
  }
  pen.lineWidth = Math.max(1.2, size / 7);
  pen.beginPath();
  if (health === "healthy") pen.roundRect(x, y, size, size, size / 4);
  if (health === "unknown") pen.roundRect(x + 1, y + 1, size - 2, size - 2, size / 4);
  if (health === "degraded") {
    pen.moveTo(x + size / 2, y);
    pen.lineTo(x + size, y + size);
    pen.lineTo(x, y + size);
  }
  if (health === "down") {
    const edge = size / 8;
    pen.lineWidth = size / 3.2;
    pen.moveTo(x + edge, y + edge);
    pen.lineTo(x + size - edge, y + size - edge);
    pen.moveTo(x + size - edge, y + edge);
    pen.lineTo(x + edge, y + size - edge);
  }
  if (health === "healthy" || health === "degraded") pen.fill();
  else pen.stroke();
}

function frame(pen, place, colour, width) {
  const [x, y] = [(place % map.columns) * map.size, Math.floor(place / map.columns) * map.size];
  Object.assign(pen, { strokeStyle: colour, lineWidth: width });
  pen.strokeRect(x, y, map.size - 1, map.size - 1);
}

/** The page's colours of this moment, as the style sheet has them. */
function coloursNow(drawn) {
  const found = { ink: getComputedStyle(drawn).color };
  for (const health of ORDER) {
    const sample = document.querySelector(`#legend .mark.${health}`);
    found[health] = sample ? getComputedStyle(sample).color : found.ink;
  }
  return found;
}
