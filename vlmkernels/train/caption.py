"""Another name of :mod:`vlmkernels.use.caption`."""

import sys

from vlmkernels.use import caption

sys.modules[__name__] = caption
