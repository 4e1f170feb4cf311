"""Programs. `lingua` is loaded first of all: it sets what torch reads once, when it is loaded."""

import lingua as lingua
