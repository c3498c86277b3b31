"""The hot path in Triton, for CUDA: float32 with products of a chosen precision, bfloat16 and float16.

    triton_scores      a tile of z = x @ W.T + b, and the k largest of a row
    triton_topk        the k best of every token, selected inside the encoder's product
    triton_collect     all entries within an interval, the same way
    triton_threshold   selection by a threshold a feature, or by one that leaves n slots in the batch, without a sync
    triton_gather      sums and dot products over active entries
    triton_adam      Adam with gradients that are made where they are used
    triton_rows        decoder rows of norm 1, and gradients that keep them so

The kernels are checked through Triton's interpreter and compiled for compute capability 9.0. Their speed on a GPU has not
been measured. What there is to tune stands in capitals at the top of each file.
"""

from nndecomp.decompositions.backends.triton_gather import add_bags, by_feature, dots, feature_sums
from nndecomp.decompositions.backends.triton_rows import normalise, project_out
from nndecomp.decompositions.backends.triton_threshold import BatchTopK, above
from nndecomp.decompositions.backends.triton_topk import topk


class Triton:
    name = "triton"

    def __init__(self) -> None:
        self.batchtopk = BatchTopK()

    topk = staticmethod(topk)
    above = staticmethod(above)
    by_feature = staticmethod(by_feature)
    add_bags = staticmethod(add_bags)
    dots = staticmethod(dots)
    feature_sums = staticmethod(feature_sums)
    project_out = staticmethod(project_out)
    normalise = staticmethod(normalise)


BACKEND = Triton()
