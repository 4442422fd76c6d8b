"""What /proc says of this very process, held against what Python knows of it."""

import os
import socket
import threading
import time

import pytest

from overlay import process


def test_usage_is_this_processes() -> None:
    spent = time.process_time()
    while time.process_time() < spent + 0.05:
        pass
    usage = process.usage()
    assert usage.cpu_seconds == pytest.approx(time.process_time(), abs=0.5)
    assert 1 << 20 < usage.resident_bytes < 1 << 32
    assert usage.threads == len(os.listdir("/proc/self/task"))  # noqa: PTH208
    assert time.time() - 86400 < usage.started < time.time() + 2


def test_threads_and_descriptors_are_counted() -> None:
    before = process.usage()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with socket.socket():
        during = process.usage()
    done.set()
    thread.join()
    assert during.threads == before.threads + 1
    assert during.descriptors == before.descriptors + 1


def test_counters_are_those_of_the_devices_asked_for_and_there() -> None:
    found = process.device_counts(["lo", "no-such-device"])
    assert found.keys() == {"lo"}
    assert len(found["lo"]) == 8 and all(number >= 0 for number in found["lo"].values())


def test_what_goes_into_the_loopback_device_comes_out_of_it() -> None:
    before = process.device_counts(["lo"])["lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(10):
                sender.sendto(b"x" * 1000, receiver.getsockname())
                receiver.recv(2000)
    after = process.device_counts(["lo"])["lo"]
    for way in ("receive", "transmit"):
        assert after[way, "packets"] >= before[way, "packets"] + 10
        assert after[way, "bytes"] >= before[way, "bytes"] + 10_000


def test_interfaces_are_up_down_or_not_there() -> None:
    assert process.device_up("lo") is True
    assert process.device_up("no-such-device") is None
