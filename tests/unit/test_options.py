"""Options: every way to give one leads to the same value, and every mistake is told precisely."""

import argparse
import dataclasses
import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import metrics, options, reference
from overlay.options import AskOptions, EtcdOptions, HostOptions, OptionError, Options
from subnet_lease.model import Prefix, pack_address

ROOT = Path(__file__).parents[2]


def parser() -> options.Parser:
    top = options.Parser(prog="overlay-agent")
    commands = top.add_subparsers(dest="command")
    options.add_arguments(commands.add_parser("run"), Options)
    cleanup = commands.add_parser("cleanup")
    options.add_arguments(cleanup, HostOptions)
    cleanup.add_argument("--release", action="store_true")
    return top


def run(*argv: str, environ: Mapping[str, str] | None = None, toml: str = "", path: str = "/f.toml") -> Options:
    arguments = parser().parse_args(["run", *argv])
    return options.resolve(Options, arguments, environ or {}, toml, path)


def refusal(*argv: str, environ: Mapping[str, str] | None = None, toml: str = "") -> str:
    with pytest.raises(OptionError) as caught:
        run(*argv, environ=environ, toml=toml)
    text = options.format_error(caught.value)
    assert len(text.splitlines()) <= 2
    return text


# --- sources and precedence --------------------------------------------------------------------------------------


def test_without_anything_given_the_defaults_hold() -> None:
    resolved = run()
    assert resolved == Options(subnet_lease_renew_margin=3600.0)
    assert resolved.etcd_endpoints == ("http://127.0.0.1:2379",)
    assert resolved.healthz_ip == "127.0.0.1"
    assert not resolved.etcd_tls


def test_flag_wins_over_own_variable_over_flannels_variable_over_file_over_default() -> None:
    toml = 'etcd-prefix = "/file"'
    flannel = {"FLANNELD_ETCD_PREFIX": "/flannel"}
    own = {"OVERLAY_AGENT_ETCD_PREFIX": "/own", **flannel}
    assert run("--etcd-prefix=/flag", environ=own, toml=toml).etcd_prefix == "/flag"
    assert run(environ=own, toml=toml).etcd_prefix == "/own"
    assert run(environ=flannel, toml=toml).etcd_prefix == "/flannel"
    assert run(toml=toml).etcd_prefix == "/file"
    assert run().etcd_prefix == "/coreos.com/network"


def test_an_empty_variable_counts_as_unset() -> None:
    environ = {"OVERLAY_AGENT_IFACE": "", "FLANNELD_IFACE": "eth7"}
    assert run(environ=environ).iface == ("eth7",)


def test_an_option_that_flannel_lacks_has_no_flannel_variable() -> None:
    environ = {"FLANNELD_NODE_NAME": "n"}
    assert run(environ=environ).node_name is None
    assert options.ignored_environment(environ) == {"FLANNELD_NODE_NAME": "there is no such option"}


words = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x17F, exclude_categories=["C", "Z"]), min_size=1, max_size=20
).filter(lambda text: not text.startswith("-"))
ipv4 = st.ip_addresses(v=4).map(str)
endpoints = st.lists(
    st.tuples(st.just("http://"), ipv4, st.integers(1, 65535)).map(lambda parts: f"{parts[0]}{parts[1]}:{parts[2]}"),
    min_size=1,
    max_size=4,
)

# attribute -> texts of the value, and what they are read as
VALUES: dict[str, st.SearchStrategy[tuple[list[str], Any]]] = {
    "etcd_endpoints": endpoints.map(lambda urls: (urls, tuple(urls))),
    "etcd_prefix": st.lists(st.sampled_from(["a", "net", "b.c"]), min_size=1).map(
        lambda parts: (["/" + "/".join(parts)], "/" + "/".join(parts))
    ),
    "iface": st.lists(words, min_size=1, max_size=3).map(lambda names: (names, tuple(names))),
    "iface_regex": st.sampled_from(["^eth[0-9]{1,2}$", "10\\.0\\..*"]).map(lambda text: ([text], (text,))),
    "iface_can_reach": st.ip_addresses().map(lambda address: ([str(address)], str(address))),
    "public_ip": ipv4.map(lambda text: ([text], text)),
    "public_ipv6": st.ip_addresses(v=6).map(lambda address: ([address.exploded], str(address))),
    "no_masquerade_cidr": st.lists(ipv4, min_size=1, max_size=3).map(
        lambda found: ([f"{text}/32" for text in found], tuple(Prefix.parse(f"{text}/32") for text in found))
    ),
    "source_guard": st.sampled_from(["on", "log", "off"]).map(lambda text: ([text], text)),
    "nexthop_objects": st.booleans().map(lambda value: (["true" if value else "false"], value)),
    "probes": st.booleans().map(lambda value: (["true" if value else "false"], value)),
    "probe_interval": st.integers(1, 3600).map(lambda number: ([str(number)], number)),
    "probe_peers": st.integers(0, 100).map(lambda number: ([str(number)], number)),
    "probe_port": st.integers(0, 65535).map(lambda number: ([str(number)], number)),
    "subnet_file": words.map(lambda text: (["/run/" + text], "/run/" + text)),
    "subnet_lease_ttl": st.integers(7201, 86400).map(lambda number: ([str(number)], number)),
    "subnet_lease_renew_margin": st.integers(1, 120).map(lambda number: ([str(number)], number * 60.0)),
    "node_name": words.map(lambda text: ([text], text)),
    "ip_masq": st.booleans().map(lambda value: (["true" if value else "false"], value)),
    "healthz_ip": st.ip_addresses().map(lambda address: ([str(address)], str(address))),
    "healthz_port": st.integers(0, 65535).map(lambda number: ([str(number)], number)),
    "control_socket": words.map(lambda text: (["/run/" + text], "/run/" + text)),
    "control_socket_mode": st.sampled_from(["0600", "0660", "0666"]).map(lambda text: ([text], text)),
    "log_level": st.sampled_from(["debug", "info", "warning", "error"]).map(lambda text: ([text], text)),
    "log_format": st.sampled_from(["auto", "console", "json"]).map(lambda text: ([text], text)),
}


LISTS = {"etcd_endpoints", "iface", "iface_regex", "no_masquerade_cidr"}
BARE = {
    "subnet_lease_ttl", "subnet_lease_renew_margin", "ip_masq", "healthz_port", "nexthop_objects",
    "probes", "probe_interval", "probe_peers", "probe_port",
}  # fmt: skip


def toml_of(name: str, texts: list[str]) -> str:
    if name in BARE:
        return texts[0]
    # A JSON string without escapes for other scripts is a TOML string.
    return json.dumps(texts if name in LISTS else texts[0], ensure_ascii=False)


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_the_same_values_come_out_whether_given_by_flag_variable_or_file(given_: dict[str, Any]) -> None:
    expected = {name: value for name, (_, value) in given_.items()}
    flags, own, flannel, toml = [], {}, {}, []
    for name, (texts, _) in given_.items():
        flag = name.replace("_", "-")
        if name == "etcd_endpoints":
            flags.append(f"-{flag}={','.join(texts)}")
        else:
            flags += [f"--{flag}={text}" for text in texts]
        toml.append(f"{flag} = {toml_of(name, texts)}")
        if len(texts) == 1 or name == "etcd_endpoints":
            own["OVERLAY_AGENT_" + name.upper()] = ",".join(texts)
            flannel["FLANNELD_" + name.upper()] = ",".join(texts)
    by_flag, by_file = run(*flags), run(toml="\n".join(toml))
    assert {name: getattr(by_flag, name) for name in expected} == expected
    assert by_flag == by_file
    by_variable = run(environ=own)
    for name, value in expected.items():
        if "OVERLAY_AGENT_" + name.upper() in own:
            assert getattr(by_variable, name) == value
    theirs = run(environ=flannel)
    for name in set(expected) & {"etcd_endpoints", "etcd_prefix", "public_ip", "ip_masq", "healthz_port"}:
        assert getattr(theirs, name) == expected[name]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--public-ip=2001:db8::1", "'2001:db8::1' is not an IPv4 address"),
        ("--public-ipv6=192.0.2.1", "'192.0.2.1' is not an IPv6 address"),
        ("--public-ipv6=nonsense", "'nonsense' is not an IPv6 address"),
    ],
)
def test_an_address_of_the_wrong_family_is_refused(argv: str, says: str) -> None:
    assert says in refusal(argv)


def test_public_addresses_are_those_that_were_given_ipv4_first() -> None:
    both = run("--public-ipv6=2001:db8::1", "--public-ip=192.0.2.1")
    assert both.public_addresses == (pack_address("192.0.2.1"), pack_address("2001:db8::1"))
    assert run("--public-ipv6=2001:db8::1").public_addresses == (pack_address("2001:db8::1"),)
    assert run().public_addresses == ()


def test_flags_may_have_one_dash_as_flanneld_takes_them() -> None:
    resolved = run("-etcd-endpoints=http://10.0.0.1:2379,http://10.0.0.2:2379", "-iface", "eth0", "-ip-masq")
    assert resolved.etcd_endpoints == ("http://10.0.0.1:2379", "http://10.0.0.2:2379")
    assert resolved.iface == ("eth0",)
    assert resolved.ip_masq


def test_spaces_and_a_trailing_comma_between_endpoints_are_no_matter() -> None:
    assert run("--etcd-endpoints", "http://a:1, http://b:2/,").etcd_endpoints == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--ip-masq", True),
        ("--ip-masq=true", True),
        ("--ip-masq=false", False),
        ("--ip-masq=1", True),
        ("-ip-masq=F", False),
    ],
)
def test_a_switch_takes_an_optional_value(argument: str, value: bool) -> None:
    assert run(argument, environ={"FLANNELD_IP_MASQ": "true"}).ip_masq is value


def test_the_file_to_read_comes_from_flag_then_variable_then_default() -> None:
    given_flag = parser().parse_args(["run", "--config", "/a.toml"])
    none = parser().parse_args(["run"])
    environ = {"OVERLAY_AGENT_CONFIG": "/b.toml"}
    assert options.config_file(given_flag, environ) == ("/a.toml", True)
    assert options.config_file(none, environ) == ("/b.toml", True)
    assert options.config_file(none, {}) == ("/etc/overlay-agent/overlay-agent.toml", False)


def test_another_command_shares_the_file_and_has_its_own_flags() -> None:
    arguments = parser().parse_args(["cleanup", "--release", "--iface=eth1"])
    toml = 'etcd-prefix = "/net"\nhealthz-port = 10256\nip-masq = "not looked at"'
    resolved = options.resolve(HostOptions, arguments, {"FLANNELD_PUBLIC_IP": "10.0.0.1"}, toml)
    assert resolved == HostOptions(etcd_prefix="/net", iface=("eth1",), public_ip="10.0.0.1")
    assert arguments.release
    assert options.resolve(EtcdOptions, argparse.Namespace(), {}, toml) == EtcdOptions(etcd_prefix="/net")


def test_command_that_asks_the_agent_takes_its_socket_and_nothing_of_etcd() -> None:
    toml = 'control-socket = "/run/a.sock"\netcd-prefix = "/net"\n'
    assert options.resolve(AskOptions, argparse.Namespace(), {}, toml) == AskOptions(control_socket="/run/a.sock")


# --- the lease's times -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ttl", "margin"), [(86400, 3600), (7200, 3600), (5400, 2700), (10, 5)])
def test_the_default_renew_margin_gives_way_to_a_short_lease(ttl: int, margin: float) -> None:
    assert run(f"--subnet-lease-ttl={ttl}").subnet_lease_renew_margin == margin


def test_a_renew_margin_that_was_asked_for_is_kept_or_refused() -> None:
    assert run("--subnet-lease-ttl=3600", "--subnet-lease-renew-margin=59").subnet_lease_renew_margin == 59 * 60
    assert "60 minutes are not less than the lease's 3600 seconds" in refusal(
        "--subnet-lease-ttl=3600", "--subnet-lease-renew-margin=60"
    )


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--etcd-endpoint=x"], "--etcd-endpoint: there is no such option\n  Did you mean --etcd-endpoints?"),
        (["--ip-mas"], "--ip-mas: there is no such option\n  Did you mean --ip-masq?"),
        (["-healthz-prt=1"], "Did you mean --healthz-port?"),
        (["--zzzzzzz"], "--zzzzzzz: there is no such option\n  See overlay-agent --help."),
        (["stray"], "'stray': this argument belongs to no option"),
        (["--iface"], "--iface: expected one argument"),
        (["--kube-subnet-mgr"], "leases from the Kubernetes API are not supported; this agent leases from etcd\n"),
        (["-net-config-path=/x"], "read from etcd, not from a file\n  Put it there: etcdctl put"),
        (["--iptables-resync=5"], "rules are in nftables"),
        (["-v=3"], "Use --log-level debug."),
        (["-v", "3"], "-v: log levels have names here"),
    ],
)
def test_an_unknown_flag_is_named_with_what_to_do_instead(argv: list[str], says: str) -> None:
    assert says in refusal(*argv)


def test_a_wrong_command_is_refused_in_the_same_form() -> None:
    with pytest.raises(OptionError) as caught:
        parser().parse_args(["rnu"])
    assert "invalid choice: 'rnu'" in options.format_error(caught.value)


def test_an_error_of_the_parser_without_an_option_names_the_arguments() -> None:
    group = options.Parser(prog="x")
    group.add_argument("word")
    with pytest.raises(OptionError):
        group.parse_args([])
    with pytest.raises(OptionError) as caught:
        group.error("something is wrong")
    assert options.format_error(caught.value) == "overlay-agent: arguments: something is wrong\n  See x --help."


def test_arguments_are_taken_from_the_process_if_none_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["overlay-agent", "run", "-node-name=n1"])
    assert options.resolve(Options, parser().parse_args(), {}).node_name == "n1"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("healthz-port", "65536", "'65536' is not a whole number from 0 to 65535"),
        ("healthz-port", "1e3", "is not a whole number"),
        ("healthz-port", "\u0661", "is not a whole number"),
        ("subnet-lease-renew-margin", "1440", "'1440' is not a whole number from 1 to 1439"),
        ("subnet-lease-ttl", "0", "from 1 to"),
        ("ip-masq", "yes", "'yes' is neither true nor false"),
        ("public-ip", "fd00::1", "'fd00::1' is not an IPv4 address"),
        ("public-ip", "10.0.0.256", "is not an IPv4 address"),
        ("healthz-ip", "localhost", "'localhost' is not an IP address"),
        ("iface-regex", "eth[", "is not a regular expression"),
        ("log-level", "trace", "'trace' is none of debug, info, warning, error"),
        ("etcd-prefix", "/a//b", "is not a key prefix"),
        ("etcd-endpoints", "10.0.0.1:2379", "is not of the form http://HOST:PORT"),
        ("etcd-endpoints", "http://a:0", "is not of the form"),
        ("etcd-endpoints", "http://a", "is not of the form"),
        ("etcd-endpoints", " , ", "must not be empty"),
        ("node-name", "a\nb", "must be printable"),
        ("node-name", "a" * 254, "at most 253 characters"),
        ("subnet-file", "a\x00b", "must be one line of printable text"),
    ],
)
def test_a_bad_value_is_refused_with_the_option_and_the_place_it_came_from(name: str, text: str, says: str) -> None:
    variable = name.upper().replace("-", "_")
    by_flag = refusal(f"--{name}={text}")
    assert by_flag.startswith(f"overlay-agent: --{name}: ")
    by_variable = refusal(environ={f"OVERLAY_AGENT_{variable}": text})
    assert by_variable.startswith(f"overlay-agent: --{name} (from environment variable OVERLAY_AGENT_{variable}): ")
    assert says in by_flag
    assert says in by_variable


def test_an_empty_flag_is_refused() -> None:
    assert refusal("--public-ip=") == "overlay-agent: --public-ip: must not be empty"


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("healthz-port = 70000", "--healthz-port (from file /f.toml, key healthz-port): '70000' is not a whole number"),
        ('healthz-port = "1"', "key healthz-port): must be a whole number without quotes"),
        ("healthz-port = true", "must be a whole number"),
        ("ip-masq = 1", "must be true or false without quotes"),
        ("etcd-prefix = 1", "must be a string in quotes"),
        ('etcd-endpoints = "http://a:1"', "must be a list of strings"),
        ("iface = []", "must be a list of strings"),
        ("iface = [1]", "must be a list of strings"),
        ('etcd_prefix = "/x"', "etcd_prefix (from file /f.toml): there is no such key\n  Did you mean etcd-prefix?"),
        ("qqqq = 1", "overlay-agent: qqqq (from file /f.toml): there is no such key"),
        ('[etcd]\nprefix = "/x"', "there is no such table\n  All keys stand at the top level"),
        ('etcd-password = "hush"', "a configuration file holds no password\n  Write it to a file"),
        ("kube-subnet-mgr = true", "leases from the Kubernetes API are not supported"),
        ("iface = [", "--config: /f.toml is not TOML at end of document"),
        ("a = 1\nb == 2", "--config: /f.toml is not TOML at line 2"),
    ],
)
def test_a_mistake_in_the_file_is_named_by_file_and_key(toml: str, says: str) -> None:
    text = refusal(toml=toml)
    assert says in text
    assert "hush" not in text


CA, CERT, KEY = "--etcd-cafile=/ca", "--etcd-certfile=/cert", "--etcd-keyfile=/key"
TLS = "--etcd-endpoints=https://a:2379"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([TLS, CA, CERT], "--etcd-certfile: a certificate is of no use without its key\n  Add --etcd-keyfile."),
        ([TLS, CA, KEY], "--etcd-keyfile: a key is of no use without its certificate\n  Add --etcd-certfile."),
        ([TLS, CERT, KEY], "Add --etcd-cafile."),
        ([CA], "--etcd-cafile: all endpoints are plain http"),
        (["--etcd-endpoints=https://a:1,http://b:1"], "some endpoints are https, some plain http"),
        (["--etcd-username=u"], "a user needs a password"),
        (["--etcd-password-file=/p"], "a password was given without its user"),
    ],
)
def test_options_that_contradict_each_other_are_refused(argv: list[str], says: str) -> None:
    assert says in refusal(*argv)


def test_full_client_authentication_is_accepted() -> None:
    resolved = run(TLS, CA, CERT, KEY, "--etcd-username=u", "--etcd-password-file=/p")
    assert resolved.etcd_tls
    assert resolved.etcd_keyfile == "/key"


# --- secrets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--etcd-password=hush"], ["--etcd-password", "hush"], ["-etcd-password", "hush"]])
def test_a_password_on_the_command_line_is_refused_and_not_repeated(argv: list[str]) -> None:
    text = refusal(*argv)
    assert "--etcd-password-file" in text
    assert "hush" not in text


@pytest.mark.parametrize("prefix", ["FLANNELD_", "OVERLAY_AGENT_"])
def test_a_password_in_the_environment_is_accepted_and_never_shown(prefix: str) -> None:
    resolved = run("--etcd-username=u", environ={f"{prefix}ETCD_PASSWORD": "hush"})
    assert resolved.etcd_password is not None
    assert resolved.etcd_password.reveal() == "hush"
    assert "hush" not in f"{resolved} {resolved!r} {dataclasses.asdict(resolved)} {resolved.etcd_password}"


def test_two_passwords_are_refused() -> None:
    environ = {"FLANNELD_ETCD_PASSWORD": "hush"}
    text = refusal("--etcd-username=u", "--etcd-password-file=/p", environ=environ)
    assert "the environment holds a password as well" in text
    assert "hush" not in text


def test_credentials_in_an_endpoint_are_refused_and_not_repeated() -> None:
    text = refusal("--etcd-endpoints=http://u:hush@a:2379")
    assert "an endpoint holds no credentials" in text
    assert "hush" not in text


# --- variables that are read over --------------------------------------------------------------------------------


def test_variables_that_no_option_has_are_reported_with_the_reason_and_not_refused() -> None:
    environ = {
        "FLANNELD_KUBE_SUBNET_MGR": "true",
        "FLANNELD_SOMETHING": "1",
        "FLANNELD_V": "5",
        "FLANNELD_EMPTY": "",
        "FLANNELD_IFACE": "eth0",
        "OVERLAY_AGENT_PORT": "tcp://10.0.0.1:80",
        "OVERLAY_AGENT_CONFIG": "/x",
        "PATH": "/bin",
    }
    run(environ=environ)
    assert options.ignored_environment(environ) == {
        "FLANNELD_KUBE_SUBNET_MGR": "leases from the Kubernetes API are not supported; this agent leases from etcd",
        "FLANNELD_SOMETHING": "there is no such option",
        "OVERLAY_AGENT_PORT": "there is no such option",
    }


# --- help and documents ------------------------------------------------------------------------------------------


def test_help_fits_80_columns_and_names_every_option_with_its_variable() -> None:
    run_parser = options.Parser(prog="overlay-agent run")
    options.add_arguments(run_parser)
    text = run_parser.format_help()
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for field in dataclasses.fields(Options):
        if field.name != "etcd_password":
            assert f"--{field.name.replace('_', '-')} " in flat
        assert f"OVERLAY_AGENT_{field.name.upper()}" in flat
    for group in options.GROUPS:
        assert f"\n{group}:\n" in text


def test_the_committed_documents_are_the_generated_ones() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference.reference(), "run python -m overlay.reference"
    assert (ROOT / "deploy/overlay-agent.toml").read_text() == reference.example(), (
        "run python -m overlay.reference example"
    )
    assert (ROOT / "docs/metrics.md").read_text() == metrics.reference(), "run python -m overlay.reference metrics"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [([], reference.reference), (["example"], reference.example), (["metrics"], metrics.reference)],
)
def test_the_module_prints_the_documents(arguments: list[str], text: Any) -> None:
    command = [sys.executable, "-m", "overlay.reference", *arguments]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == text()


def test_the_example_is_harmless_as_it_is_and_valid_when_uncommented() -> None:
    assert tomllib.loads(reference.example()) == {}
    lines = [line[1:] for line in reference.example().splitlines() if line.startswith("#") and line[1:2].isalpha()]
    resolved = run(toml="\n".join(lines))
    expected = {field.name.replace("_", "-") for field in dataclasses.fields(Options)} - {"etcd-password"}
    assert set(tomllib.loads("\n".join(lines))) == expected
    assert resolved.etcd_tls
    assert resolved.subnet_lease_renew_margin == 3600


def test_the_reference_has_a_row_for_every_option() -> None:
    text = reference.reference()
    for field in dataclasses.fields(Options):
        assert f"`OVERLAY_AGENT_{field.name.upper()}`" in text
    assert max(map(len, text.split("\n## ")[0].splitlines())) <= 120


def test_a_value_may_begin_with_a_dash_and_a_digit() -> None:
    parser = options.Parser()
    parser.add_argument("--at")
    assert parser.parse_args(["--at", "-2h"]).at == "-2h"
