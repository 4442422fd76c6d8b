// What there is to know at one glance: health, figures of this host, what is wrong, how many fare how, what happened.

import { $, ORDER, WORDS, ago, called, count, el, mark, span, spoken, sync, withCode, write } from "./dom.js";

export function showHealth({ status, here }) {
  const name = status.agent?.node_name ?? (here && called(here));
  write($("title"), name ? `Overlay seen from ${name}` : "overlay-agent");
  document.title = name ? `${status.health} · ${name} · overlay` : "overlay-agent";
  if ($("health").textContent !== status.health) $("health").replaceChildren(mark(status.health));
}

/** Label, value, and a line on it, of what this host is and has. */
function* figures({ status, counts }, hosts) {
  const { agent, lease, network, devices, underlay, etcd, dataplane, firewall } = status;
  yield ["Hosts", counts ? hosts.toLocaleString("en") : "not known", agent && `agent ${agent.version}`];
  if (lease) {
    const left = lease.left_s === null ? "lease not confirmed yet" : `lease ends in ${span(lease.left_s)}`;
    yield ["Subnet of this host", lease.subnets.join(" "), lease.reserved ? "reserved" : left];
  }
  if (network) {
    const tunnel = network.vni === null ? "" : ` ${network.vni}, port ${network.port}`;
    const state = devices?.map((each) => `${each.name} ${each.up ? "up" : each.up === null ? "missing" : "down"}`);
    yield ["Backend", network.backend + tunnel, state?.join(", ")];
    yield ["MTU of the pods", `${network.mtu}`, underlay && `${underlay.interface} has ${underlay.mtu}`];
  }
  if (etcd) {
    const away = etcd.data_age_s === null ? "not heard yet" : `away for ${span(etcd.data_age_s)}`;
    yield ["etcd", etcd.connected ? "connected" : away, `revision ${etcd.revision}`];
  }
  if (dataplane) {
    const { wanted, missing, last_change: change } = dataplane;
    const entries = missing ? `${missing} of ${wanted} missing` : `all ${wanted.toLocaleString("en")} in place`;
    yield ["Entries", entries, `checked ${ago(dataplane.last_pass_ago_s)}`];
    const last = change ? `last change ${ago(change.ago_s)}, ${Math.round(change.took_ms)} ms` : "";
    yield ["Drift repaired", dataplane.drift.toLocaleString("en"), last];
  }
  if (firewall && firewall.guard !== "off") {
    const dropped = ["strangers", "impostors", "strays"].map((name) => firewall[name] ?? 0);
    const sum = dropped.reduce((one, other) => one + other, 0);
    yield ["Guard", count(sum, "packet"), firewall.guard === "log" ? "would be dropped" : "dropped"];
  }
}

export function showFigures(picture, hosts) {
  sync($("figures"), figures(picture, hosts), ([label]) => label, ([label]) =>
    el("div", {}, el("dt", {}, label), el("dd", {}, el("span"), el("small"))), (node, [, value, more]) => {
    write(node.querySelector("dd span"), value);
    write(node.querySelector("small"), more || "");
  });
}

export function showProblems({ status }) {
  const problems = status.problems ?? [];
  $("trouble").hidden = !problems.length;
  sync($("problems"), problems, JSON.stringify, (problem) => {
    const { severity, subject, what } = problem;
    const item = el("li", {}, mark(severity, subject && !what.includes(subject) ? `${subject}: ${what}` : what));
    for (const text of [problem.evidence, problem.remedy].flat().filter((each) => each && each !== what)) {
      item.append(el("p", { class: "quiet" }, ...withCode(text)));
    }
    return item;
  });
}

export function showLegend({ counts, search }, shown) {
  const items = counts ? [...ORDER].reverse() : [];
  sync($("legend"), items, (health) => health, (health) => el("li", {}, mark(health, "")), (node, health) => {
    node.className = shown[health] ? "" : "zero";
    const of = search ? ` of ${counts[health].toLocaleString("en")}` : "";
    write(node.firstElementChild, `${shown[health].toLocaleString("en")}${of} ${WORDS[health]}`);
  });
}

const AMISS = /refused|rejected|taken_over|drift|altered|lost|exhausted|gone|unreachable|denied|unusable|missed/;

export function showEvents({ events, made_at }) {
  const note = !events ? "No journal is kept: nobody knows what happened." : "Nothing has happened since the journal began.";
  const items = events?.length ? events : [{ note }];
  sync($("events"), items, JSON.stringify, (event) => {
    if (event.note) return el("li", { class: "none" }, event.note);
    const facts = Object.entries(event.facts).map(([name, value]) => `${spoken(name)} ${value}`);
    const at = Number.isFinite(event.at) ? new Date(1000 * event.at) : null;
    return el("li", {},
      el("time", at && !Number.isNaN(at.getTime()) ? { dateTime: at.toISOString(), title: at.toLocaleString() } : {}),
      mark(AMISS.test(event.kind) ? "degraded" : "unknown", spoken(event.kind)),
      el("small", {}, facts.join(" · ")));
  }, (node, event) => {
    if (event.facts) write(node.querySelector("time"), ago(event.at === null ? NaN : Math.max(0, made_at - event.at)));
  });
}

