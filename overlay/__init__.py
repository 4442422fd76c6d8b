"""What this host's kernel should hold so that its pods reach all others, and the loop that keeps it so."""

__version__ = "0.1.0"
