"""Moved to lingua.config.base; this name stays for one release, for plugins."""

from lingua.config.base import *  # noqa: F403
