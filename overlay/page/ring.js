// Some tens of hosts on a ring, and the tunnels between them. Places follow subnets, this host on top: nothing jumps.

import { ORDER, WORDS, bySubnet, called, pathsOf, svg, sync, told, worse, write } from "./dom.js";

const WIDTH = 780;
const LABELLED = 16;
const ALL_TUNNELS = 12;

const SHAPES = {
  healthy: "M0-12A12 12 0 1 1 0 12 12 12 0 1 1 0-12Z",
  unknown: "M0-11A11 11 0 1 1 0 11 11 11 0 1 1 0-11Z",
  degraded: "M0-15 15 12H-15Z",
  down: "M-13-8-8-13 0-5 8-13 13-8 5 0 13 8 8 13 0 5-8 13-13 8-5 0Z",
};

export function showRing(place, picture, chosen, select) {
  if (!place.querySelector("svg")) {
    const label = "Hosts on a ring, tunnels between them; the list below says the same";
    const ring = svg("svg", { role: "group", "aria-label": label });
    ring.append(svg("g", { "aria-hidden": "true" }), svg("g"));
    place.replaceChildren(ring);
  }
  const [tunnels, nodes] = place.firstElementChild.children;
  const all = picture.here ? [picture.here, ...picture.hosts] : picture.hosts;
  const hosts = bySubnet(all);
  const top = Math.max(0, hosts.indexOf(picture.here));
  const small = hosts.length > LABELLED;
  const radius = hosts.length < 2 ? 0 : small ? 155 : 190;
  const spots = new Map(hosts.map((host, number) => {
    const angle = (2 * Math.PI * (number - top)) / hosts.length - Math.PI / 2;
    const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
    return [host.key, { x: WIDTH / 2 + radius * cos, y: radius * sin, cos, sin, angle }];
  }));
  const heights = [...spots.values()].map(({ y }) => y);
  const [upper, lower] = [Math.min(0, ...heights) - (small ? 115 : 58), Math.max(0, ...heights) + (small ? 115 : 58)];
  place.firstElementChild.setAttribute("viewBox", `0 ${upper} ${WIDTH} ${lower - upper}`);
  place.firstElementChild.classList.toggle("small", small);
  drawTunnels(tunnels, picture, all, spots, chosen);
  sync(nodes, hosts, (host) => host.key, (host) => node(host.key, nodes, select), (drawn, host) => {
    const spot = spots.get(host.key);
    drawn.setAttribute("class", `node ${host.health}${host === picture.here ? " here" : ""}`);
    drawn.setAttribute("transform", `translate(${spot.x.toFixed(1)} ${spot.y.toFixed(1)})`);
    drawn.setAttribute("aria-pressed", host.key === chosen);
    drawn.setAttribute("tabindex", host.key === chosen ? 0 : -1);
    drawn.setAttribute("aria-label", `${called(host)}, ${host.subnets.join(" ")}, ${WORDS[host.health]}`);
    drawn.querySelector(".shape").setAttribute("d", SHAPES[host.health]);
    label(drawn, host, spot, hosts.length);
  });
}

function node(key, nodes, select) {
  const drawn = svg("g", { role: "button" }, svg("title"), svg("circle", { class: "halo", r: 19 }),
    svg("path", { class: "shape" }), svg("text"), svg("text", { class: "sub" }));
  drawn.addEventListener("click", () => select(key));
  drawn.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") select(key);
    else if (step === undefined) return;
    else {
      const all = [...nodes.children];
      all.at((all.indexOf(drawn) + step) % all.length).focus();
    }
    event.preventDefault();
  });
  return drawn;
}

/** Beside the host, or above and below it; where there are many, along the line from the middle. */
function label(drawn, host, { cos, sin, angle }, hosts) {
  const [title, , , name, sub] = drawn.children;
  const small = hosts > LABELLED;
  const beside = small || Math.abs(cos) > 0.3;
  const side = cos < -1e-6 ? -1 : 1;
  const x = beside ? 24 * side : 0;
  const y = beside ? (small ? 4 : 8 * sin) : sin < 0 && hosts > 1 ? -40 : 36;
  const degrees = (angle * 180) / Math.PI + (side < 0 ? 180 : 0);
  for (const [text, down] of [[name, 0], [sub, 15]]) {
    text.setAttribute("text-anchor", beside ? (side < 0 ? "end" : "start") : "middle");
    text.setAttribute("x", x);
    text.setAttribute("y", y + down);
    if (small) text.setAttribute("transform", `rotate(${degrees.toFixed(1)})`);
    else text.removeAttribute("transform");
  }
  const full = called(host);
  const most = small ? 13 : 22;
  write(title, `${full} ${host.subnets.join(" ")}`);
  write(name, full.length > most ? `${full.slice(0, most - 1)}…` : full);
  write(sub, small || full === host.subnets[0] ? "" : host.subnets.join(" ").slice(0, 24));
}

function drawTunnels(place, picture, all, spots, chosen) {
  const paths = pathsOf(picture);
  const drawn = [];
  all.forEach((one, from) => all.slice(from + 1).forEach((other, more) => {
    const to = from + 1 + more;
    const both = [paths.get(`${from} ${to}`), paths.get(`${to} ${from}`)];
    const ours = one === picture.here;
    if (!ours && all.length > ALL_TUNNELS && !both.some(Boolean)) return;
    let health = both.filter(Boolean).map((path) => path.health).reduce(worse, "healthy");
    if (!both.some(Boolean)) health = "unknown";
    // Without entries nothing leaves from here, measured or not.
    if (ours && other.state !== "programmed") health = "down";
    drawn.push({ health, one, other, both });
  }));
  drawn.sort((one, other) => ORDER.indexOf(other.health) - ORDER.indexOf(one.health));
  place.replaceChildren(...drawn.map(({ health, one, other, both }) => {
    const [a, b] = [spots.get(one.key), spots.get(other.key)];
    // The more hosts, the more they bend towards the middle: neighbours' tunnels stay apart from the ring.
    const pull = all.length > 4 ? 0.35 : 0;
    const bend = (from, to, middle) => ((from + to) / 2) * (1 - pull) + middle * pull;
    const [x, y] = [bend(a.x, b.x, WIDTH / 2), bend(a.y, b.y, 0)];
    const near = one.key === chosen || other.key === chosen ? " near" : "";
    const there = `${called(one)} to ${called(other)}: ${told(both[0])}`;
    const back = `${called(other)} to ${called(one)}: ${told(both[1])}`;
    const d = `M${a.x.toFixed(1)} ${a.y.toFixed(1)}Q${x.toFixed(1)} ${y.toFixed(1)} ${b.x.toFixed(1)} ${b.y.toFixed(1)}`;
    return svg("path", { d, class: `tunnel ${health}${near}` }, svg("title", {}, `${there}\n${back}`));
  }));
}
