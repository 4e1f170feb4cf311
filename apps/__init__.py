"""Programs. `lingua` is imported first: it sets environment variables that torch reads once, when it is loaded."""

import lingua as lingua
