"""Moved to lingua.optim.schedule; this name stays for one release, for plugins."""

from lingua.optim.schedule import *  # noqa: F403
