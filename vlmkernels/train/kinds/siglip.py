"""SigLIP (Zhai et al. 2023): CLIP's towers, by the sigmoid loss of every image with every text."""

from __future__ import annotations

import math
from typing import ClassVar

from .clip import Clip


class Siglip(Clip):
    """A CLIP with a bias in its logits, for which ``objective.contrastive_loss`` is the sigmoid loss."""

    name = "siglip"
    start: ClassVar = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0}  # section 3.2
    label_smoothing = None
    has_bias = True
