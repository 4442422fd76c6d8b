"""The scenarios of namespaces, agents and packets on another kernel than this machine's: Debian's, in an emulator.

`python -m tests.kernels` fetches a kernel package of this machine's Debian with apt-get, unpacks what it needs below
`build/kernels/` and installs nothing. QEMU boots that kernel without a disk: the emulated machine sees this one's files
through 9p, read-only, and writes to memory, so the tree, its virtual environment and all programs are as they are here.
It has no network but its own. Its console is this program's output; its second serial port takes the one number that
`boot.sh` reports.

Exit code: 0 all passed, 1 something failed, 2 wrong usage.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = TREE / "build/kernels"

MEMORY = "3G"
"""Of the emulated machine. What is written there stays there."""

WANTED_MODULES = tuple(
    f"kernel/{part}/" for part in ("arch", "crypto", "fs", "lib", "net", "drivers/net", "drivers/virtio")
)
"""Parts of the package that are unpacked; graphics and sound make up most of it."""

ROOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
"""What it takes to reach this machine's files. Everything else is loaded from there, on demand."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of pytest. `agent_options` go to every agent of every lab."""

    title: str
    arguments: tuple[str, ...]
    agent_options: str = ""


OVERLAY = tuple(
    f"tests/netns/test_overlay.py::test_{name}"
    for name in (
        "every_pod_reaches_every_other",
        "device_is_as_flannel_makes_it",
        "peer_appears_and_goes_with_its_lease",
        "what_is_altered_by_hand_comes_back",
        "fourth_host_joins_and_is_reached_by_all",
        "host_that_leaves_with_release_leaves_nothing_anywhere",
        "all_agents_killed_and_restarted_under_a_ping_lose_nothing_and_write_nothing",
        "host_is_taken_over_from_flanneld_under_a_ping_with_no_packet_lost",
    )
)
"""What depends on the kernel most: a lab takes half a minute to come up in an emulator."""

LINKS = ("tests/netns/test_underlay.py::test_other_kinds_of_links_carry_the_overlay_as_well", "--every-link")

PACKETS = tuple(
    f"tests/packet/test_encapsulation.py::test_{name}"
    for name in (
        "vxlan_header_has_the_i_flag_and_the_vni_and_no_other_bit",
        "outer_header_leads_from_vtep_to_vtep_as_the_leases_have_them",
        "inner_frame_is_from_mac_to_mac_and_holds_the_pods_packet_less_a_hop_at_each_host",
        "nothing_is_ever_flooded",
    )
)

CORE = Pass("the core scenarios", ("tests/netns/test_dataplane_contract.py", *LINKS, *OVERLAY, *PACKETS))
BAD_LINKS = Pass("links that lose, delay, reorder and repeat", ("tests/kernels/bad_links.py",))
PLAIN_ROUTES = Pass(
    "without nexthop objects",
    ("tests/kernels/plain_routes.py", "tests/kernels/bad_links.py", *PACKETS),
    agent_options="--nexthop-objects=false",
)
PASSES = (CORE, BAD_LINKS, PLAIN_ROUTES)


class Refused(Exception):
    """What stands in the way, as one sentence."""


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel and its modules, unpacked: `directory` holds `vmlinuz` and `lib/modules/<release>`."""

    directory: Path
    release: str

    @property
    def modules(self) -> Path:
        return self.directory / "lib/modules" / self.release


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--package",
        default="linux-image-amd64",
        help="a kernel package with 9p modules, or one that depends on it (default: %(default)s)",
    )
    parser.add_argument("--minutes", type=float, default=60, help="give up after (default: %(default)s)")
    parser.add_argument(
        "pytest", nargs="*", metavar="ARGUMENT", help="for pytest, after --; one pass with these instead of the usual"
    )
    arguments = parser.parse_args()
    passes = [Pass("what was asked for", tuple(arguments.pytest))] if arguments.pytest else PASSES
    try:
        _require_programs()
        return _boot(_unpacked(arguments.package), passes, arguments.minutes)
    except Refused as reason:
        print(f"{parser.prog}: {reason}", file=sys.stderr)
        return 1


def _require_programs() -> None:
    programs = ("apt-get", "apt-cache", "dpkg-deb", "busybox", "qemu-system-x86_64")
    if missing := [program for program in programs if shutil.which(program) is None]:
        raise Refused(
            f"{', '.join(missing)} not found; this needs Debian and its packages qemu-system-x86, busybox-static"
        )
    if platform.machine() != "x86_64":
        raise Refused(f"the emulated machine runs this one's programs, which are for {platform.machine()}, not x86_64.")


# --- the kernel --------------------------------------------------------------------------------------------------


def _unpacked(package: str) -> KernelImage:
    """The newest kernel that `package` stands for, fetched unless it is there already."""
    name = _newest(package)
    directory = BUILD / name
    if not directory.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
            _fetch(name, Path(scratch))
            # Under its own name only once it is complete.
            (Path(scratch) / "unpacked").rename(directory)
    (modules,) = (directory / "lib/modules").iterdir()
    return KernelImage(directory, modules.name)


def _newest(package: str) -> str:
    """The package that holds the kernel: `package` itself, or what it depends on."""
    for attempt in range(2):
        said = _output("apt-cache", "depends", "--important", package)
        found = re.findall(r"^ +Depends: (linux-image-[0-9]\S+)$", said, re.MULTILINE)
        if said:
            return found[0] if found else package
        if attempt == 0:
            # A machine that was just set up has no lists of packages.
            subprocess.run(["apt-get", "--quiet", "--quiet", "update"], check=False)
    raise Refused(f"apt knows no package {package}; name another kernel with --package.")


def _fetch(name: str, scratch: Path) -> None:
    """Download the package and unpack the parts that are needed into `scratch`/unpacked."""
    print(f"Fetching {name}; it is not installed", flush=True)
    # Not as the user _apt, who may not write here.
    if subprocess.run(
        ["apt-get", "--quiet", "-o", "APT::Sandbox::User=root", "download", name], cwd=scratch
    ).returncode:
        raise Refused(f"apt-get cannot download {name}; if its lists are old: apt-get update")
    (package,) = scratch.glob("*.deb")
    target = scratch / "unpacked"
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = _wanted(member.name)
            if path and member.isfile():
                member.name = path
                archive.extract(member, target, filter="data")
    if unpacking.returncode:
        raise Refused(f"{package.name} cannot be unpacked.")
    (modules,) = (target / "lib/modules").iterdir()
    subprocess.run(["busybox", "depmod", "-b", target, modules.name], check=True)


def _wanted(name: str) -> str:
    """Where a file of the package goes, empty for nowhere."""
    path = name.removeprefix("./").removeprefix("usr/")
    if path.startswith("boot/vmlinuz-"):
        return "vmlinuz"
    inside = re.fullmatch(r"lib/modules/[^/]+/(.+)", path)
    return path if inside and inside[1].startswith((*WANTED_MODULES, "modules.")) else ""


# --- the emulated machine ----------------------------------------------------------------------------------------


def _boot(kernel: KernelImage, passes: Sequence[Pass], minutes: float) -> int:
    """Boot, run the passes, print what they say; the exit code."""
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        scratch = Path(directory)
        result = scratch / "result"
        argv = [
            # One nanosecond for each instruction: deadlines hold however slow or busy this machine is.
            *("qemu-system-x86_64", "-accel", "tcg", "-icount", "shift=0", "-cpu", "max", "-smp", "1"),
            *("-m", MEMORY, "-nodefaults", "-no-reboot", "-display", "none", "-net", "none"),
            *("-serial", "stdio", "-serial", f"file:{result}"),
            *("-kernel", str(kernel.directory / "vmlinuz"), "-initrd", str(_initramfs(kernel, passes, scratch))),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        ]
        print(f"Booting {kernel.release}", flush=True)
        try:
            subprocess.run(argv, stdin=subprocess.DEVNULL, check=True, timeout=minutes * 60)
        except subprocess.TimeoutExpired:
            raise Refused(f"not done after {minutes:g} minutes.") from None
        except subprocess.CalledProcessError as error:
            raise Refused(f"QEMU ended with exit code {error.returncode}.") from None
        said = result.read_text().strip()
        if not said:
            raise Refused("the emulated machine stopped before it had a result.")
        return int(said)


def _initramfs(kernel: KernelImage, passes: Sequence[Pass], scratch: Path) -> Path:
    """An image of `boot.sh`, busybox, the modules that reach this machine's files, and what to run there."""
    root = scratch / "root"
    for name in ("bin", "dev", "proc", "host", "writes", "new"):
        (root / name).mkdir(parents=True)
    busybox = Path(shutil.which("busybox") or "")
    if b"/ld-linux" in busybox.read_bytes():
        raise Refused("busybox must be linked statically; on Debian: apt-get install busybox-static")
    shutil.copy2(busybox, root / "bin/busybox")
    shutil.copy2(HERE / "boot.sh", root / "init")
    (root / "init").chmod(0o755)
    modules = root / "lib/modules" / kernel.release
    for path in _with_dependencies(kernel.modules / "modules.dep"):
        (modules / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(kernel.modules / path, modules / path)
    shutil.copy2(kernel.modules / "modules.dep", modules)
    settings = {"tree": TREE, "modules": kernel.modules, "root_modules": " ".join(ROOT_MODULES)}
    (root / "settings").write_text("".join(f"{name}={shlex.quote(str(value))}\n" for name, value in settings.items()))
    (root / "passes").write_text("".join(f"{_command(each)}\n" for each in passes))
    image = scratch / "initramfs"
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with image.open("wb") as output:
        packing = ["busybox", "cpio", "-o", "-H", "newc"]
        subprocess.run(packing, cwd=root, input=names.encode(), stdout=output, stderr=subprocess.DEVNULL, check=True)
    return image


def _with_dependencies(index: Path) -> list[str]:
    """The files of `ROOT_MODULES` and of all they need, by depmod's index. What is built in is not there."""
    needs = {}
    for line in index.read_text().splitlines():
        path, _, others = line.partition(":")
        needs[Path(path).name.partition(".")[0]] = [path, *others.split()]
    return sorted({path for name in ROOT_MODULES for path in needs.get(name, ())})


def _command(each: Pass) -> str:
    """One line of shell: this interpreter's pytest, which leaves no trace in the tree."""
    # An interpreter's directory is part of what it is: not the file a link leads to.
    pytest = (sys.executable, "-m", "pytest", "--color=no", "-q", "-p", "no:cacheprovider", "--durations=5")
    variables = [f"LAB_AGENT_OPTIONS={each.agent_options}"] if each.agent_options else []
    return f"echo {shlex.quote('== ' + each.title)}; " + shlex.join(["env", *variables, *pytest, *each.arguments])


def _output(*argv: str) -> str:
    """What a program says; nothing if it fails."""
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
