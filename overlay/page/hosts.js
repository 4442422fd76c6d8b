// The list of hosts, which says all that the pictures say; the host that is looked at; what a search has found.

import { $, NOTHING, WORDS, ago, called, count, el, mark, percent, rtt, spoken, sync, told, write } from "./dom.js";

/** Why a host fares as it does, in some words. */
function reason(host) {
  if (host.missing_count) return count(host.missing_count, "entry missing", "entries missing");
  if (host.state === "unreachable") return "this underlay cannot reach it";
  const path = host.path;
  if (path?.cause) return spoken(path.cause);
  if (path?.health === "down") return "nothing comes back";
  if (path?.health === "degraded") return "packets are lost";
  if (host.health === "degraded" && host.says) return `it says so itself, ${ago(host.says.ago_s)}`;
  return "";
}

export function showHosts(picture, chosen, select, turn) {
  const { here, hosts, search, start, counts } = picture;
  const own = here && start === 0 && (!search || search.here) ? [here] : [];
  const body = $("rows");
  sync(body, [...own, ...hosts], (host) => host.key, (host) => row(host.key, body, select), (node, host) => {
    const [name, fares, subnet, underlay, time, loss, largest, measured, changed] = node.children;
    const path = host.path;
    write(name, called(host) + (host === here ? " (this host)" : ""));
    name.title = called(host);
    const why = reason(host);
    if (fares.dataset.said !== host.health + why) {
      fares.dataset.said = host.health + why;
      fares.replaceChildren(mark(host.health), why ? ` ${why}` : "");
    }
    write(subnet, host.subnets.join(" "));
    write(underlay, host.underlay.join(" "));
    write(time, path ? `${rtt(path.rtt_ms)}${path.rtt_ms === null ? "" : " ms"}` : NOTHING);
    write(loss, path ? percent(path.loss) : NOTHING);
    write(largest, path?.mtu ? `${path.mtu}` : NOTHING);
    write(measured, host === here ? NOTHING : path ? ago(path.ago_s) : "not measured");
    write(changed, ago(host.changed_ago_s));
    node.setAttribute("aria-selected", host.key === chosen);
  });
  const rows = [...body.children];
  const current = rows.find((node) => node.dataset.host === chosen) ?? rows[0];
  const focused = rows.find((node) => node === document.activeElement);
  for (const node of rows) node.tabIndex = node === (focused ?? current) ? 0 : -1;
  showPages(picture, turn);
  showFound(picture);
  if (!counts) write($("window"), "");
}

function row(key, body, select) {
  const cells = Array.from({ length: 8 }, () => el("td"));
  cells[0].className = "why";
  cells[1].className = cells[2].className = "mono";
  const node = el("tr", { tabIndex: -1, "data-host": key }, el("th", { scope: "row" }), ...cells);
  node.addEventListener("click", () => select(key));
  node.addEventListener("keydown", (event) => {
    const to = {
      ArrowDown: node.nextElementSibling,
      ArrowUp: node.previousElementSibling,
      Home: body.firstElementChild,
      End: body.lastElementChild,
    };
    if (event.key === "Enter" || event.key === " ") select(key);
    else if (!(event.key in to)) return;
    else if (to[event.key]) {
      node.tabIndex = -1;
      to[event.key].tabIndex = 0;
      to[event.key].focus();
    } else if (event.key === "ArrowUp") $("find").focus();
    event.preventDefault();
  });
  return node;
}

/** Put the keyboard on the first host of the list, and look at it if `choose`. */
export function focusFirst(choose) {
  const first = $("rows").firstElementChild;
  first?.focus();
  if (choose) first?.click();
}

function showPages({ counts, search, start, hosts }, turn) {
  const found = Object.values((search ? search.counts : counts) ?? {}).reduce((sum, number) => sum + number, 0);
  $("pager").hidden = found <= hosts.length;
  const place = (number) => number.toLocaleString("en");
  write($("window"), `peers ${place(start + 1)} to ${place(start + hosts.length)} of ${place(found)}, worst first`);
  $("earlier").disabled = start === 0;
  $("later").disabled = start + hosts.length >= found;
  $("earlier").onclick = () => turn(-1);
  $("later").onclick = () => turn(1);
}

function showFound({ search, here, hosts }) {
  $("found").hidden = !search;
  if (!search) return write($("found"), "");
  const number = Object.values(search.counts).reduce((sum, each) => sum + each, search.here ? 1 : 0);
  const first = search.here ? here : hosts[0];
  let text = `${count(number, "host")} found for “${search.text}”.`;
  if (search.kind === "address" && first) {
    const host = first.underlay.includes(search.text);
    const where = host ? "the underlay address of" : `in ${first.subnets.join(" and ")}, the subnet of`;
    text = `${search.text} is ${where} ${called(first)}${host ? "" : ` at ${first.underlay.join(" and ")}`}.`;
    if (number > 1) text += ` ${count(number - 1, "other lease")} name it too.`;
  } else if (search.kind === "address") {
    const where = search.inside ? "lies in the overlay's network, but no lease" : "is none of the overlay's; no lease";
    text = `${search.text} ${where} known here holds it.`;
  }
  write($("found"), text);
}

// --- one host ---

function* facts(host, here) {
  yield ["Health", mark(host.health, [WORDS[host.health], reason(host)].filter(Boolean).join(": "))];
  yield ["Subnets", host.subnets.join(" ") || NOTHING];
  yield ["Underlay", host.underlay.join(" ") || NOTHING];
  yield ["Tunnel MAC", host.macs.join(" ") || NOTHING];
  yield ["MTU of its pods", host.mtu ? `${host.mtu} bytes` : "it does not say"];
  if (here) return;
  yield ["Path from here", told(host.path)];
  if (host.says) yield ["It says", `${host.says.health ?? "nothing of its health"}, ${ago(host.says.ago_s)}`];
  yield ["Lease changed", host.changed_ago_s === null ? "not since the agent's start" : ago(host.changed_ago_s)];
  for (const text of host.missing) yield ["Missing", text];
  if (host.missing_count > host.missing.length) yield ["", `and ${host.missing_count - host.missing.length} more`];
}

function paths(title, list) {
  if (!list?.length) return [];
  const items = list.map((path) => el("li", { title: told(path) }, el("span", {}, called(path)),
    mark(path.health, path.health === "down" ? spoken(path.cause ?? "down") : `${rtt(path.rtt_ms)} ms`)));
  return [el("h4", {}, title), el("ul", { "aria-label": title }, ...items)];
}

export function showDetails(picture, chosen) {
  const { here, hosts } = picture;
  const asked = picture.host?.key === chosen ? picture.host : null;
  const host = asked ?? [here, ...hosts].find((each) => each?.key === chosen);
  if (!host) {
    const text = chosen ? "This host has left, or is not in the list any more." : "Choose a host in the picture or the list.";
    $("details").replaceChildren(el("p", { class: "none" }, text));
    return;
  }
  const own = host.key === here?.key;
  const list = [...facts(host, own)].flatMap(([term, value]) => [el("dt", {}, term), el("dd", {}, value)]);
  const nothing = asked && !asked.outward.length && !asked.inward.length;
  const parts = [
    el("h3", {}, called(host) + (own ? " (this host)" : "")),
    el("dl", {}, ...list),
    ...paths("Measured by it, worst first", asked?.outward),
    ...paths("Measured towards it, worst first", asked?.inward),
    ...(nothing ? [el("p", { class: "none" }, "No path to it or from it has been measured.")] : []),
  ];
  $("details").replaceChildren(...parts);
}
