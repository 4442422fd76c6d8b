"""The web page in a real browser: clusters of 3 to 15,000 hosts, old data, hostile names, the keyboard, both themes."""

import dataclasses
import json
import signal
from collections.abc import Iterator

import pytest

from overlay import picture
from overlay.cluster import Lab, wait_until
from overlay.picture import Facts
from subnet_lease.model import Lease, LeaseAttrs, Vtep, encode_attrs
from tests.conftest import MakeLab
from tests.netns.browser import REBOUND, Browser, Page
from tests.netns.pictures import PictureServer, address_in, facts, name_of, served
from tests.netns.scrape import OPTIONS, PORT


def hurry(factor: int) -> str:
    """A script that has time on the page run so many times as fast, and keeps how long it wanted to wait."""
    return (
        "const usual = window.setTimeout; window.delays = [];"
        f" window.setTimeout = (work, delay) => (delays.push(delay), usual(work, delay / {factor}));"
    )


HURRY = hurry(20)

EXPECTED_ROWS = {3: 3, 40: 40, 1000: 101, 15_000: 101}

HOSTILE = "<script>window.harm = 1</script><img src=x onerror='window.harm = 2'>\u202eevil"

READY = "document.querySelectorAll('#rows tr').length"


def put(lab: Lab, key: str, attrs: LeaseAttrs) -> None:
    assert lab.store.create(key, encode_attrs(attrs), 0)


def delete(lab: Lab, key: str) -> None:
    record = next(record for record in lab.store.snapshot().records if record.key == key)
    assert lab.store.delete(key, record.mod_revision)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[PictureServer]:
    """Its facts are what a test makes them."""
    with served(None) as running:
        yield running


def shown(browser: Browser, server: PictureServer, what: Facts, *, scheme: str = "light") -> Page:
    """The page, with these facts on it."""
    server.facts = what
    page = browser.open(server.url, scheme=scheme, before=HURRY)
    page.wait(READY)
    return page


@pytest.fixture
def three(browser: Browser, server: PictureServer) -> Iterator[Page]:
    """A page that shows three healthy hosts."""
    page = shown(browser, server, facts(3, faults=False))
    yield page
    browser.close(page)


def with_names(what: Facts, text: str) -> Facts:
    """The same with this as every name and text that somebody else chooses."""
    assert what.own is not None
    assert what.peers is not None

    def named(lease: Lease) -> Lease:
        return lease._replace(attrs=lease.attrs._replace(node_name=text))

    problem = {"severity": "degraded", "what": text, "cause": text, "evidence": [text], "remedy": f"`{text}`"}
    agent = {**what.status["agent"], "node_name": text}
    return dataclasses.replace(
        what,
        status={**what.status, "agent": agent, "problems": [problem, problem]},
        own=named(what.own),
        peers={key: named(lease) for key, lease in what.peers.items()},
        lacking={next(iter(what.peers)): [text]},
        events=[(1.0, text, {text: [text, {text: text}]}), (1e30, "", {})],
    )


# --- sizes ---


@pytest.mark.parametrize("hosts", EXPECTED_ROWS)
def test_every_size_of_a_cluster_is_shown_whole(browser: Browser, server: PictureServer, hosts: int) -> None:
    made = facts(hosts)
    page = shown(browser, server, made)
    assert page.value(READY) == EXPECTED_ROWS[hosts]
    counts = picture.document(made)["counts"]
    assert sum(counts.values()) == hosts - 1
    legend = page.texts("#legend li")
    assert legend == [
        f"{counts[health]:,} {word}"
        for health, word in (
            ("healthy", "healthy"),
            ("unknown", "not measured"),
            ("degraded", "degraded"),
            ("down", "down"),
        )
    ]
    assert f"{hosts:,}" in page.text("#figures")
    assert page.texts("#rows tr")[1].startswith(name_of(2) if hosts == 3 else "node-")
    assert "down" in page.texts("#rows tr")[1]
    assert page.value("!!document.querySelector('#picture svg')") is (hosts <= 40)
    assert page.value("!!document.querySelector('#picture canvas')") is (hosts > 40)
    assert page.value("document.documentElement.scrollWidth <= innerWidth"), "wider than the window"
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(server.url)] == []
    browser.close(page)


def test_a_small_window_shows_all_without_scrolling_sideways(browser: Browser, server: PictureServer) -> None:
    page = shown(browser, server, facts(1000))
    page.resize(390, 800)
    page.wait("innerWidth === 390 && document.querySelector('canvas').clientWidth < 390")
    assert page.value("document.documentElement.scrollWidth") <= 390
    browser.close(page)


def test_what_is_sent_stays_small_at_any_size(browser: Browser, server: PictureServer) -> None:
    for hosts in (1000, 15_000):
        page = shown(browser, server, facts(hosts))
        sizes = page.value("performance.getEntriesByType('resource').map((each) => [each.name, each.encodedBodySize])")
        document = [size for name, size in sizes if "/api/" in name]
        assert document
        assert max(document) < 100_000
        browser.close(page)


# --- old data ---


def test_an_agent_that_fails_or_is_gone_is_said_to_be_silent_and_its_last_picture_is_grey(
    browser: Browser, server: PictureServer
) -> None:
    with served(facts(3)) as mortal:
        page = browser.open(mortal.url, before=hurry(100))
        page.wait(READY)
        assert page.value("document.body.className") == ""
        assert page.texts(".banner") == []
        mortal.facts = None
        page.wait("document.body.classList.contains('stale')")
        assert "The agent does not answer (it answers 500)" in page.text("#banners")
        assert page.value("getComputedStyle(document.querySelector('main')).filter") == "grayscale(1)"
        assert page.value(READY) == 3
        mortal.facts = facts(3)
        page.wait("!document.body.classList.contains('stale')")
        assert page.texts(".banner") == []
    page.wait("document.body.classList.contains('stale')")
    assert "The agent does not answer. What you see is" in page.text("#banners")
    page.wait("delays.filter((delay) => delay === 30000).length > 1")
    waits = page.value("delays.filter((delay) => delay >= 3000)")
    at = max(place for place, delay in enumerate(waits) if delay == 3000)
    assert waits[at : at + 6] == [3000, 6000, 12000, 24000, 30000, 30000]
    browser.close(page)


def test_a_page_that_never_had_an_answer_says_so(browser: Browser, server: PictureServer) -> None:
    server.facts = None
    page = browser.open(server.url, before=HURRY)
    page.wait("document.querySelector('.banner')")
    assert page.text("#age") == "no data yet"
    browser.close(page)


def test_etcd_away_is_told_with_the_age_of_what_is_shown(three: Page, server: PictureServer) -> None:
    assert server.facts is not None
    away = {"connected": False, "data_age_s": 185.0, "revision": 7, "reason": "nobody answers"}
    server.facts = dataclasses.replace(server.facts, status={**server.facts.status, "etcd": away})
    three.wait("document.querySelector('.banner')")
    assert three.text("#banners").startswith("etcd does not answer: who joined or left meanwhile is not known.")
    assert three.text("#banners").endswith("It is silent for 3 min.")
    assert "away for 3 min" in three.text("#figures")


def test_a_reconciler_that_does_not_say_is_told(three: Page, server: PictureServer) -> None:
    assert server.facts is not None
    server.facts = dataclasses.replace(server.facts, peers=None)
    three.wait("document.querySelector('.banner')")
    assert "does not say who its peers are" in three.text("#banners")


def test_what_is_not_measured_is_shown_as_that(three: Page, server: PictureServer) -> None:
    assert server.facts is not None
    nothing = Facts(server.facts.made_at, server.facts.status, server.facts.own, server.facts.peers)
    server.facts = nothing
    three.wait("document.querySelector('#legend').innerText.includes('2 not measured')")
    assert three.texts("#rows tr")[1].count("not measured") == 2
    assert "its probes are off" in three.text("#matrix-note")
    assert "No journal is kept" in three.text("#events")


def test_an_agent_that_starts_has_a_page(browser: Browser, server: PictureServer) -> None:
    problem = {"severity": "down", "what": "the agent waits for etcd", "evidence": [], "remedy": ""}
    server.facts = Facts(1.0, {"schema": 1, "health": "down", "problems": [problem], "agent": None})
    page = browser.open(server.url, before=HURRY)
    page.wait("document.querySelector('#problems li')")
    assert page.text("#health") == "down"
    assert page.text("#problems") == "the agent waits for etcd"
    assert page.complaints == []
    browser.close(page)


def test_nobody_looking_nothing_is_asked(three: Page, server: PictureServer) -> None:
    three.value(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true}),"
        " document.dispatchEvent(new Event('visibilitychange')), 1"
    )
    # What was under way may still arrive; then none follows, though each would after 0.15 s.
    before = three.value("new Promise((done) => usual(() => done(delays.length), 500))")
    assert three.value("new Promise((done) => usual(() => done(delays.length), 500))") == before
    three.value("delete document.hidden, document.dispatchEvent(new Event('visibilitychange')), 1")
    three.wait(f"delays.length > {before}")


# --- what others can do ---


def test_hostile_names_are_text(browser: Browser, server: PictureServer) -> None:
    for hosts in (3, 100):
        page = shown(browser, server, with_names(facts(hosts), HOSTILE))
        assert page.texts("#rows tr th")[1] == HOSTILE.replace("\u202e", "\ufffd")
        assert len(page.texts("#problems li")) == 2
        for place in ("#problems", "#events", "#details", "#title"):
            assert "<script>" in page.text(place), place
        page.press("/")
        page.value(
            f"document.activeElement.value = {json.dumps(HOSTILE)},"
            " document.activeElement.dispatchEvent(new Event('input')), 1"
        )
        page.wait("document.querySelector('#found').innerText.includes('<script>')")
        assert page.value("typeof window.harm") == "undefined"
        assert page.value("document.querySelectorAll('img, iframe, style, script:not([src])').length") == 0
        assert page.complaints == []
        browser.close(page)


def test_the_policy_forbids_what_the_page_does_not_need(three: Page) -> None:
    for attempt in (
        "document.body.innerHTML = '<b>x</b>'",
        "eval('1')",
        "fetch('http://127.0.0.1:9/')",
        "new Worker('page/main.js')",
        "document.body.append(Object.assign(document.createElement('script'), {src: '/page/dom.js'}))",
    ):
        done = three.value(
            f"(async () => {{ try {{ await ({attempt}); return 'done'; }} catch {{ return 'no'; }} }})()"
        )
        assert done == "no", attempt
    refused = three.value(
        "new Promise((done) => { const image = new Image(); image.onerror = () => done('refused');"
        " image.onload = () => done('loaded'); image.src = 'data:image/gif;base64,R0lGODlhAQABAAAAACw='; })"
    )
    assert refused == "refused"


# --- finding and moving about ---


def test_the_keyboard_alone_finds_who_holds_an_address(browser: Browser, server: PictureServer) -> None:
    made = facts(1000, faults=False)
    page = shown(browser, server, made)
    assert made.peers is not None
    key, lease = list(made.peers.items())[700]
    page.press("/")
    page.press(*address_in(lease), "Enter")
    page.wait(f"document.activeElement.dataset.host === {json.dumps(key)}")
    assert page.text("#found") == (
        f"{address_in(lease)} is in {lease.subnets[0]}, the subnet of {lease.attrs.node_name} at 172.16.2.190."
    )
    page.wait(f"document.querySelector('#details h3').innerText === {json.dumps(lease.attrs.node_name)}")
    assert page.value(READY) == 1
    page.press("/", "Escape")
    page.wait(f"{READY} === 101")
    assert page.value("document.activeElement === document.body")
    page.press("/")
    page.press(*"192.0.2.1")
    page.wait("document.querySelector('#found').innerText.includes('no lease known here holds it')")
    page.press("Escape")
    page.wait(f"{READY} === 101")
    browser.close(page)


def test_arrows_move_through_the_list_and_enter_shows_a_host(three: Page) -> None:
    three.press("/", "ArrowDown", "ArrowDown", "Enter")
    three.wait(f"document.querySelector('#details h3').innerText === '{name_of(2)}'")
    assert three.value("document.querySelector('#rows tr[aria-selected=true] th').innerText") == name_of(2)
    three.press("End")
    assert three.value("document.activeElement.querySelector('th').innerText") == name_of(3)
    # What is drawn anew keeps the keyboard where it is.
    number = three.value("delays.length")
    three.wait(f"delays.length > {number} + 3")
    assert three.value("document.activeElement.querySelector('th').innerText") == name_of(3)


def test_the_ring_is_walked_by_arrows(three: Page) -> None:
    three.value("document.querySelector('.node.here').focus()")
    three.press("ArrowRight", "Enter")
    three.wait(f"document.querySelector('#details h3').innerText === '{name_of(2)}'")
    assert three.value("document.activeElement.getAttribute('aria-pressed')") == "true"


def test_the_map_shows_hosts_that_no_page_has_listed_yet(browser: Browser, server: PictureServer) -> None:
    made = facts(2000, faults=False)
    page = shown(browser, server, made)
    page.value("document.querySelector('canvas').focus()")
    page.press("End", "Enter")
    page.wait(f"document.querySelector('#details h3').innerText === '{name_of(2000)}'")
    assert page.text("#window") == "peers 1,901 to 1,999 of 1,999, worst first"
    page.press("Home", "Enter")
    page.wait(f"document.querySelector('#details h3').innerText === '{name_of(1)} (this host)'")
    page.click("#earlier")
    page.wait("document.querySelector('#window').innerText.startsWith('peers 1,801')")
    page.click("canvas")
    page.wait("/^node-/.test(document.querySelector('#details h3').innerText) && !document.querySelector('.node')")
    browser.close(page)


def test_pausing_stops_the_clock_of_the_picture(three: Page, server: PictureServer) -> None:
    three.press("p")
    assert three.text("#age").startswith("paused, ")
    assert three.value("document.querySelector('#pause').getAttribute('aria-pressed')") == "true"
    server.facts = facts(5, faults=False)
    before = three.value("new Promise((done) => usual(() => done(delays.length), 500))")
    assert three.value("new Promise((done) => usual(() => done(delays.length), 500))") == before
    three.press("p")
    three.wait(f"{READY} === 5")


# --- real agents ---


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    """Three hosts whose agents serve the page; tests leave it as they found it."""
    made = make_module_lab(pods=1, agent_options=(*OPTIONS, "--probe-interval", "2"))
    made.up()
    return made


@pytest.fixture(scope="module")
def page_of_h1(lab: Lab) -> Iterator[Page]:
    """The page of the agent on h1 in a browser on h1, from where nothing but the lab can be reached."""
    with Browser(lab.hosts[0].inside) as running:
        page = running.open(f"http://127.0.0.1:{PORT}/", before=hurry(10))
        page.wait(f"{READY} === 3")
        yield page


def test_a_real_cluster_is_shown_as_its_agents_know_it(lab: Lab, page_of_h1: Page) -> None:
    for host in lab.hosts:
        row = next(row for row in page_of_h1.texts("#rows tr") if row.startswith(host.name))
        assert host.subnet in row
        assert host.underlay_ip in row
    assert page_of_h1.texts(".banner") == []
    assert page_of_h1.text("#health") == "healthy"
    assert page_of_h1.complaints == []


def test_a_pods_address_finds_its_host(lab: Lab, page_of_h1: Page) -> None:
    host = lab.hosts[2]
    page_of_h1.press("/", *host.pods[0].address, "Enter")
    page_of_h1.wait("document.querySelector('#details h3').innerText === 'h3'")
    assert page_of_h1.text("#found") == (
        f"{host.pods[0].address} is in {host.subnet}, the subnet of h3 at {host.underlay_ip}."
    )
    page_of_h1.press("/", "Escape")
    page_of_h1.wait(f"{READY} === 3")


def test_a_hostile_lease_is_shown_as_text_until_it_is_gone(lab: Lab, page_of_h1: Page) -> None:
    vtep = Vtep(1, bytes((2, 0, 0, 0, 9, 9)))
    attrs = LeaseAttrs(bytes((172, 30, 200, 9)), "vxlan", vtep, node_name=HOSTILE)
    key = "10.244.209.0-24"
    put(lab, key, attrs)
    page_of_h1.wait(f"document.querySelector('[data-host=\"{key}\"] th')?.innerText.startsWith('<script>')")
    assert page_of_h1.value("typeof window.harm") == "undefined"
    delete(lab, key)
    page_of_h1.wait(f"{READY} === 3")


def rows_with(text: str) -> str:
    """How many hosts of the list have this in their row."""
    return f"[...document.querySelectorAll('#rows tr')].filter((row) => row.innerText.includes('{text}')).length"


def test_paths_are_shown_as_they_were_measured(page_of_h1: Page) -> None:
    page_of_h1.wait(f"{rows_with(' ms')} === 2", 40)


def test_drift_is_told_with_its_repair(lab: Lab, page_of_h1: Page) -> None:
    lab.hosts[0].ip(f"route del {lab.hosts[1].subnet}")
    page_of_h1.wait(f"document.querySelector('#events').innerText.includes('entry route {lab.hosts[1].subnet}')", 20)
    page_of_h1.wait("document.querySelector('#events').innerText.includes('repaired')")


def test_hosts_that_are_cut_off_are_seen_on_the_page_and_so_is_their_return(lab: Lab, page_of_h1: Page) -> None:
    chain = "add chain bridge cut forward { type filter hook forward priority 0; policy drop; }"
    assert lab.hub.run("nft", f"add table bridge cut; {chain}").returncode == 0
    page_of_h1.wait(f"{rows_with('down')} === 2", 40)
    assert page_of_h1.text("#health") == "degraded"
    assert lab.hub.run("nft", "delete table bridge cut").returncode == 0
    page_of_h1.wait(f"{rows_with('down')} === 0", 40)
    page_of_h1.wait("document.querySelector('#health').innerText === 'healthy'", 40)


def test_etcd_away_is_seen_on_the_page_and_so_is_its_return(lab: Lab, page_of_h1: Page) -> None:
    lab.stop_etcd(signal.SIGKILL)
    page_of_h1.wait("document.querySelector('#banners').innerText.includes('etcd does not answer')")
    assert page_of_h1.value(READY) == 3
    lab.start_etcd()
    page_of_h1.wait("!document.querySelector('.banner')", 40)


def test_a_killed_agent_is_seen_on_the_page_and_so_is_its_return(lab: Lab, page_of_h1: Page) -> None:
    host = lab.hosts[0]
    host.kill_agent(signal.SIGKILL)
    page_of_h1.wait("document.body.classList.contains('stale')")
    assert page_of_h1.text("#banners").startswith("The agent does not answer. What you see is")
    assert page_of_h1.value(READY) == 3
    host.start_agent()
    host.wait_ready()
    page_of_h1.wait("!document.body.classList.contains('stale')", 40)


def test_a_site_whose_name_leads_here_reads_nothing(browser: Browser, server: PictureServer) -> None:
    server.facts = facts(3)
    page = browser.open(f"http://{REBOUND}:{server.server.port}/api/cluster")
    assert page.text("body").strip() == "this is read as localhost, or by address"
    browser.close(page)


# --- for everybody ---

_CONTRASTS = """
(() => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parts = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const over = (top, below) => top.slice(0, 3).map((part, n) => (part * top[3] + below[n] * (255 - top[3])) / 255);
  const ground = (node) => {
    const own = parts(getComputedStyle(node).backgroundColor);
    return own[3] === 255 || !node.parentElement ? own.slice(0, 3) : over(own, ground(node.parentElement));
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !node.checkVisibility() || node.closest("svg, noscript, .skip")) continue;
    const below = ground(node);
    const [one, other] = [luminance(over(parts(getComputedStyle(node).color), below)), luminance(below)];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)}: ${walk.currentNode.data.trim()}`);
  }
  return found;
})()
"""
"""Texts whose contrast is below 4.5, which WCAG 2.2 asks for (success criterion 1.4.3)."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast_in_both_themes(browser: Browser, server: PictureServer, scheme: str) -> None:
    page = shown(browser, server, facts(12), scheme=scheme)
    assert page.value(_CONTRASTS) == []
    server.facts = None
    page.wait("document.body.classList.contains('stale')")
    assert page.value(_CONTRASTS) == []
    browser.close(page)


def test_the_theme_follows_the_system_until_it_is_chosen(three: Page) -> None:
    def dark() -> bool:
        return str(three.value("getComputedStyle(document.body).backgroundColor")) == "rgb(16, 21, 26)"

    assert not dark()
    three.prefer("dark")
    assert dark()
    three.click("#theme")
    assert three.text("#theme") == "Theme: light"
    assert not dark()
    three.click("#theme")
    three.prefer("light")
    assert dark()
    three.send("Page.reload")
    three.wait(f"{READY} && document.querySelector('#theme').innerText === 'Theme: dark'")
    assert dark()
    three.click("#theme")
    assert three.text("#theme") == "Theme: auto"
    assert not dark()


_NAMED = ("button", "searchbox", "radio", "grid", "region", "link", "list", "heading", "table")


def test_screen_readers_are_told_all_that_the_pictures_show(browser: Browser, server: PictureServer) -> None:
    page = shown(browser, server, facts(3))
    told = page.accessible()
    names = [name for role, name in told if role == "button"]
    assert f"{name_of(2)}, 10.0.2.0/24, down" in names
    assert [role for role, name in told if role in _NAMED and not name] == []
    assert ("searchbox", "Find a host: an address, a subnet, a MAC or a part of a name") in told
    rows = [name for role, name in told if role == "row"]
    assert any(name_of(2) in row and "down" in row and "peer down" in row for row in rows)
    browser.close(page)
    page = shown(browser, server, facts(1000))
    maps = [name for role, name in page.accessible() if name.startswith("Map of 1,000 hosts")]
    assert maps and " down" in maps[0]
    browser.close(page)


def test_a_document_is_asked_for_again_only_after_the_one_before(three: Page, server: PictureServer) -> None:
    while server.answers.acquire(blocking=False):
        pass
    wait_until(lambda: server.answers.acquire(timeout=5), 10, "another document")
    in_flight = three.value(
        "performance.getEntriesByType('resource').filter((each) => each.name.includes('/api/'))"
        ".some((each, n, all) => n && each.startTime < all[n - 1].responseEnd)"
    )
    assert in_flight is False
