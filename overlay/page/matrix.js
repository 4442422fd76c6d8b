// Who reaches whom, and how well: rows measure, columns are measured.

import { $, bySubnet, called, count, el, pathsOf, rtt, told, write } from "./dom.js";

const MOST = 40;
const MANY = 16;
const FEW = 9;

const SHOWN = {
  rtt: (path) => rtt(path.rtt_ms),
  loss: (path) => (path.loss === null ? "–" : `${Number((100 * path.loss).toFixed(1))}`),
  mtu: (path) => (path.mtu === null ? "–" : `${path.mtu}`),
};

let latest = null;

$("metric").addEventListener("change", () => latest && showMatrix(latest));

export function showMatrix(picture) {
  latest = picture;
  const all = [picture.here, ...picture.hosts.slice(0, MOST)];
  const hosts = bySubnet(all.filter(Boolean));
  const total = picture.counts ? Object.values(picture.counts).reduce((sum, number) => sum + number, 1) : 0;
  const note = [];
  if (!picture.measured) note.push("This agent does not measure: its probes are off.");
  if (!picture.pairs.length) note.push("No path has been measured yet.");
  else if (total > hosts.length) {
    note.push(`${count(hosts.length, "host")} of ${total.toLocaleString("en")}: this one and the first of the list.`);
  }
  write($("matrix-note"), note.join(" "));
  $("matrix-note").hidden = !note.length;
  $("matrix").hidden = $("metric").hidden = !picture.pairs.length;
  if (!picture.pairs.length) return $("matrix").replaceChildren();

  const metric = document.querySelector("#metric input:checked").value;
  const paths = pathsOf(picture);
  const place = new Map(all.map((host, number) => [host, number]));
  // Of many hosts those are left out that nobody is known to have measured, or that are not known to have measured.
  const known = (which) => {
    const found = new Set(picture.pairs.map((pair) => pair[which]));
    return hosts.length > MANY ? hosts.filter((host) => found.has(place.get(host))) : hosts;
  };
  const [sources, targets] = [known(0), known(1)];
  const head = targets.map((host) => el("th", { scope: "col", title: called(host) }, el("span", {}, called(host))));
  const rows = sources.map((from) => {
    const cells = targets.map((to) => {
      if (from === to) return el("td", { class: "self" });
      const path = paths.get(`${place.get(from)} ${place.get(to)}`);
      const title = `${called(from)} to ${called(to)}: ${told(path)}`;
      const text = !path ? "" : path.health === "down" ? "✖" : SHOWN[metric](path);
      return el("td", { class: path?.health ?? "none", title }, text);
    });
    return el("tr", {}, el("th", { scope: "row", title: called(from) }, called(from)), ...cells);
  });
  // As wide as before, and scrolled as before.
  $("matrix").replaceChildren(el("table", { class: hosts.length > MANY ? "many" : hosts.length < FEW ? "few" : "", "aria-labelledby": "matrix-title" },
    el("thead", {}, el("tr", {}, el("td", { class: "self" }), ...head)), el("tbody", {}, ...rows)));
}
