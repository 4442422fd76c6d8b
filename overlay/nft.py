"""The nftables edge: the only runner of `nft`, one atomic transaction a call."""

import subprocess


class NftFailed(Exception):
    """`nft` is missing or refused the ruleset; the text is one clause for the operator."""


def apply(ruleset: str) -> None:
    """Load `ruleset` in one transaction: all of it, or nothing and NftFailed."""
    done = _run(["-f", "-"], ruleset)
    if done is None:
        raise NftFailed("the program nft is not installed (package nftables)")
    if done.returncode:
        first = done.stderr.strip().splitlines()[:1]
        raise NftFailed(f"nft refused the ruleset: {first[0] if first else f'exit code {done.returncode}'}")


def has_table(table: str) -> bool:
    """Whether `table` (`family name`) exists. Without the program there is none of ours."""
    done = _run(["list", "table", *table.split()])
    return done is not None and done.returncode == 0


def _run(arguments: list[str], text: str = "") -> "subprocess.CompletedProcess[str] | None":
    """The finished process, None if the program is missing."""
    try:
        return subprocess.run(["nft", *arguments], input=text, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise NftFailed("nft did not finish within 30 s") from None
