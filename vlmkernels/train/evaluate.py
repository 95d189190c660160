"""Another name of :mod:`vlmkernels.use.evaluate`."""

import sys

from vlmkernels.use import evaluate

sys.modules[__name__] = evaluate
