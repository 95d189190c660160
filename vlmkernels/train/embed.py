"""Another name of :mod:`vlmkernels.use.embed`."""

import sys

from vlmkernels.use import embed

sys.modules[__name__] = embed
