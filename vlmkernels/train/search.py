"""Another name of :mod:`vlmkernels.use.search`."""

import sys

from vlmkernels.use import search

sys.modules[__name__] = search
