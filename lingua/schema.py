"""Moved to lingua.config.keys; this name stays for one release, for plugins."""

from lingua.config.keys.checkpoint import *  # noqa: F403
from lingua.config.keys.distributed import *  # noqa: F403
from lingua.config.keys.generate import *  # noqa: F403
from lingua.config.keys.model import *  # noqa: F403
from lingua.config.keys.optim import *  # noqa: F403
from lingua.config.keys.profiling import *  # noqa: F403
