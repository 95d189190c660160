"""Patches live models of other code bases: open_clip, transformers, open_flamingo, timm, torch.nn.

    from vlmkernels.integrations import patch
    print(patch(model))

No other library is imported: classes are recognised by their names and by the calls in their code.
"""

from vlmkernels.integrations._patch import Entry, Report, drop_in, patch, unpatch

__all__ = ["Entry", "Report", "drop_in", "patch", "unpatch"]
