"""The maths: tensors in, tensors out; no file, no name, no terminal."""

from kasa_cli.linalg import kernels, quantities, rounding
from kasa_cli.linalg.add_and_round import Sum
from kasa_cli.linalg.bottom import ANGLE_TOLERANCE, EPS, TIE, Ends, ends, ends_of, level
from kasa_cli.linalg.frame import StreamedWeight, frame_of
from kasa_cli.linalg.gram import Gram
from kasa_cli.linalg.lowrank import svd_of_product
from kasa_cli.linalg.noise import expected_spectrum
from kasa_cli.linalg.realised import Outcome, Sums, measured_sums
from kasa_cli.linalg.rounding import ROUNDINGS, ExactSum, blocks, other_neighbour, rounded
from kasa_cli.linalg.solvers import DENSE_SIDE
from kasa_cli.linalg.spectrum import Values, values_of
from kasa_cli.linalg.subspaces import (
    Shares,
    best_cosines,
    defect,
    opposite_defect,
    principal_angles,
    random_shares,
    shares,
    spaces,
)
from kasa_cli.linalg.top import Tops, tops_of

__all__ = [
    "ANGLE_TOLERANCE",
    "DENSE_SIDE",
    "EPS",
    "ROUNDINGS",
    "TIE",
    "Ends",
    "ExactSum",
    "Gram",
    "Outcome",
    "Shares",
    "StreamedWeight",
    "Sum",
    "Sums",
    "Tops",
    "Values",
    "best_cosines",
    "blocks",
    "defect",
    "ends",
    "ends_of",
    "expected_spectrum",
    "frame_of",
    "kernels",
    "level",
    "measured_sums",
    "opposite_defect",
    "other_neighbour",
    "principal_angles",
    "quantities",
    "random_shares",
    "rounded",
    "rounding",
    "shares",
    "spaces",
    "svd_of_product",
    "tops_of",
    "values_of",
]
