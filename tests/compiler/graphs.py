"""Models that nobody rewrote, as functions: what ``mmfast.compiler`` makes of each is written beside it.

``takes``: the ops that replace something, in order. ``leaves``: what ``explain`` says of the rest, in part.
"""

import graphs_concat_linear
import graphs_contrastive_loss
import graphs_cross_attention
from cases import CASES

__all__ = ["CASES", "graphs_concat_linear", "graphs_contrastive_loss", "graphs_cross_attention"]
