// Asks the agent how the cluster fares, again and again while somebody looks, and has the answer shown.
//
// What it shows is as old as it says. An agent that does not answer is said to be silent, and asked less often.

import { $, el, parsed, span, sync, write } from "./dom.js";
import { showGrid } from "./grid.js";
import { focusFirst, showDetails, showHosts } from "./hosts.js";
import { showMatrix } from "./matrix.js";
import { showRing } from "./ring.js";
import { showEvents, showFigures, showHealth, showLegend, showProblems } from "./summary.js";

const SCHEMA = 1;
const PAGE = 100;
const PERIOD_MS = 3000;
const PERIOD_OF_MANY_MS = 5000;
const MANY = 1000;
const LONGEST_MS = 30000;
const PATIENCE_MS = 5000;
const STALE_MS = 15000;
const RING = 40;

/** What is looked at, and the latest answer: when it came, and how often there was none since. */
const view = { find: "", start: 0, host: "", paused: false, picture: null, came: 0, failures: 0, silence: "" };

let timer = 0;
let flight = null;
let asking = null;

/** Ask now. Kept as a promise until there is an answer, or none to be had; to a later question, if one comes between. */
function ask() {
  asking = inquire();
  return asking;
}

async function inquire() {
  clearTimeout(timer);
  flight?.abort();
  const mine = (flight = new AbortController());
  const query = new URLSearchParams({ find: view.find, start: view.start, most: PAGE, host: view.host });
  try {
    const signal = AbortSignal.any([mine.signal, AbortSignal.timeout(PATIENCE_MS)]);
    const response = await fetch(`api/cluster?${query}`, { signal });
    if (!response.ok) throw new Error(`it answers ${response.status}`);
    const picture = parsed(await response.text());
    if (picture.schema !== SCHEMA) throw new Error("it is of another version; reload this page");
    if (mine !== flight) return asking;
    Object.assign(view, { picture, came: Date.now(), failures: 0, silence: "", start: picture.start });
    show();
  } catch (error) {
    if (mine !== flight) return asking;
    view.failures += 1;
    view.silence = error instanceof TypeError || error.name === "TimeoutError" ? "" : error.message;
  }
  showAge();
  plan();
}

function plan() {
  clearTimeout(timer);
  if (view.paused || document.hidden) return;
  const usual = hostCount() > MANY ? PERIOD_OF_MANY_MS : PERIOD_MS;
  timer = setTimeout(ask, Math.min(LONGEST_MS, usual * 2 ** view.failures));
}

function hostCount() {
  const counts = view.picture?.counts;
  return counts ? Object.values(counts).reduce((sum, number) => sum + number, 0) + 1 : 0;
}

function show() {
  const { picture } = view;
  view.host ||= picture.here?.key ?? "";
  showHealth(picture);
  showFigures(picture, hostCount());
  showProblems(picture);
  const shown = picture.search ? picture.search.counts : picture.counts;
  showLegend(picture, shown);
  if (hostCount() <= RING) showRing($("picture"), picture, view.host, select);
  else showGrid($("picture"), picture, shown, view.host, selectPlace);
  showHosts(picture, view.host, select, turn);
  showDetails(picture, view.host);
  showMatrix(picture);
  showEvents(picture);
}

function select(key) {
  if (view.host === key) return;
  view.host = key;
  show();
  ask();
}

/** The host at a place of the map: 0 is this one, then as in the list. It may be on a page that is not here yet. */
async function selectPlace(place) {
  const { here, search } = view.picture;
  const first = here && (!search || search.here) ? 1 : 0;
  if (place < first) return select(here.key);
  const number = place - first;
  if (number < view.start || number >= view.start + view.picture.hosts.length) {
    view.start = Math.floor(number / PAGE) * PAGE;
    await ask();
  }
  const host = view.picture.hosts[number - view.start];
  if (host) select(host.key);
}

function turn(pages) {
  view.start = Math.max(0, view.start + pages * PAGE);
  ask();
}

// --- how old it is ---

function showAge() {
  const { picture, failures, paused } = view;
  const age = (Date.now() - view.came) / 1000;
  const etcd = picture?.status.etcd;
  const at = new Date(view.came).toLocaleTimeString();
  const banners = [];
  if (failures) {
    const more = picture ? ` What you see is ${span(age)} old, as of ${at}.` : "";
    const reason = view.silence && ` (${view.silence})`;
    banners.push({ kind: "down", text: `The agent does not answer${reason}.`, more });
  }
  if (etcd && !etcd.connected) {
    const more = etcd.data_age_s === null ? " Nothing was heard yet." : ` It is silent for ${span(etcd.data_age_s)}.`;
    const text = "etcd does not answer: who joined or left meanwhile is not known. Packets go on as before.";
    banners.push({ kind: "degraded", text, more });
  }
  if (picture && !picture.counts) {
    const text = "The agent does not say who its peers are: it starts, or its reconciler hangs.";
    banners.push({ kind: "down", text, more: "" });
  }
  // What changes every second is not read out again every second.
  sync($("banners"), banners, (each) => each.text, ({ kind, text }) =>
    el("p", { class: `banner ${kind}` }, text, el("span", { "aria-hidden": "true" })), (node, { more }) =>
    write(node.lastElementChild, more));
  $("age").textContent = !picture ? "no data yet" : `${paused ? "paused, " : ""}${span(age)} old`;
  document.body.classList.toggle("stale", !picture || failures > 0 || age * 1000 > STALE_MS);
}

// --- keys and buttons ---

const find = $("find");
let typed = 0;

function search() {
  clearTimeout(typed);
  if (find.value.trim() === view.find) return asking;
  Object.assign(view, { find: find.value.trim(), start: 0 });
  return ask();
}

find.addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(search, 200);
});
$("search").addEventListener("submit", async (event) => {
  event.preventDefault();
  await search();
  focusFirst(true);
});
find.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") {
    event.preventDefault();
    focusFirst(false);
  }
});

function pause() {
  view.paused = !view.paused;
  $("pause").setAttribute("aria-pressed", view.paused);
  if (view.paused) plan();
  else ask();
  showAge();
}
$("pause").addEventListener("click", pause);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && (view.find || event.target === find)) {
    find.value = "";
    find.blur();
    search();
  }
  if (event.target === find) return;
  if (event.key === "/") {
    event.preventDefault();
    find.select();
    find.focus();
  }
  if (event.key === "p") pause();
});

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  if (view.picture) show();
}

let theme = "auto";
try {
  theme = localStorage.getItem("theme") ?? theme;
} catch {
  // Without storage the choice lasts as long as the page.
}
if (!THEMES.includes(theme)) theme = "auto";
$("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  setTheme(theme);
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // As above.
  }
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.picture && show());
addEventListener("resize", () => view.picture && show());
document.addEventListener("visibilitychange", () => (document.hidden ? plan() : view.paused || ask()));
setInterval(() => document.hidden || showAge(), 1000);

setTheme(theme);
ask();
