"""Ranked List Loss, the baselines it is compared with, and a cross-batch memory.

All are pure functions of arrays, and need jax and numpy alone. Start with `ranked_list_loss`. The
README of this folder has the equations, the published variants, the recipe for several devices, and
the names in other libraries.
"""

from rll_jax.loss import baselines as baselines
from rll_jax.loss import memory
from rll_jax.loss.baselines import (
    contrastive_loss,
    lifted_structure_loss,
    multi_similarity_loss,
    n_pair_loss,
    nt_xent_loss,
    pml_ranked_list_loss,
    proxy_anchor_loss,
    sup_con_loss,
    triplet_loss,
)
from rll_jax.loss.ranked_list import (
    STATIC_ARGUMENTS,
    RankedListLossTerms,
    caffe2019,
    cvpr2019,
    ranked_list_loss,
    ranked_list_loss_of_query,
    ranked_list_loss_terms,
    tpami2020,
)
from rll_jax.loss.two_towers import two_tower_ranked_list_loss

__all__ = [
    "RankedListLossTerms",
    "STATIC_ARGUMENTS",
    "caffe2019",
    "contrastive_loss",
    "cvpr2019",
    "lifted_structure_loss",
    "memory",
    "multi_similarity_loss",
    "n_pair_loss",
    "nt_xent_loss",
    "pml_ranked_list_loss",
    "proxy_anchor_loss",
    "ranked_list_loss",
    "ranked_list_loss_of_query",
    "ranked_list_loss_terms",
    "sup_con_loss",
    "tpami2020",
    "triplet_loss",
    "two_tower_ranked_list_loss",
]
