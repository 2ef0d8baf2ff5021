"""The paper's quantities as pure functions, each with its equation, its shapes and its source.

"The paper" is MOYU, arXiv 2406.12569. Nothing here loads a model or reads a file; `moyu.research.studies` does.
"""

from moyu.measure.statistics import (
    Interval,
    bootstrap,
    equivalent,
    half_life,
    holm,
    kendall,
    mixed_model,
    pairwise_spearman,
    power,
)
from moyu.methods.cett import curve as cett_curve
from moyu.methods.cett import search as cett_search
from moyu.research.theory.force import Force, force, turning_point
from moyu.research.theory.importance import Importance, running_sum_overlap, signed_step, snip_step, taylor_step
from moyu.research.theory.initialisation import ce_gradient, forward, gini_impurity, gini_law, mse_gradient, mse_law
from moyu.research.theory.neurons import cett, cett_bound, contributions, neuron_norms, participation_ratio
from moyu.research.theory.overlap import (
    chance_corrected,
    flocking,
    jaccard,
    kappa,
    popularity_null,
    top_sets,
    uniform_null,
)
from moyu.research.theory.saliency import sign_statistic, sign_statistic_of_weights, uplift_share
from moyu.research.theory.sequence import griffin_statistic, tda_statistic
from moyu.research.theory.spectrum import intraclass_correlation, singular_energy, variance_shares

__all__ = [
    "Force",
    "Importance",
    "Interval",
    "bootstrap",
    "ce_gradient",
    "cett",
    "cett_bound",
    "cett_curve",
    "cett_search",
    "chance_corrected",
    "contributions",
    "equivalent",
    "flocking",
    "force",
    "forward",
    "gini_impurity",
    "gini_law",
    "griffin_statistic",
    "half_life",
    "holm",
    "intraclass_correlation",
    "jaccard",
    "kappa",
    "kendall",
    "mixed_model",
    "mse_gradient",
    "mse_law",
    "neuron_norms",
    "pairwise_spearman",
    "participation_ratio",
    "popularity_null",
    "power",
    "running_sum_overlap",
    "sign_statistic",
    "sign_statistic_of_weights",
    "signed_step",
    "singular_energy",
    "snip_step",
    "taylor_step",
    "tda_statistic",
    "top_sets",
    "turning_point",
    "uniform_null",
    "uplift_share",
    "variance_shares",
]
