"""Official weights: where they are, how to get them safely, how to fit them to a model.

`load_weights` finds, downloads, verifies and reads a state dict; `convert_state_dict` renames its
tensors for a model and checks that they fit:

    model = timm.create_model("shvit_s1")
    model.load_state_dict(convert_state_dict(load_weights("shvit_s1.pth"), model))

Every failure is a `WeightsError` of one line. `find_weights` and `weights_tables` give what is
known of the official releases. Nothing here imports a model.
"""

from .convert import convert_state_dict
from .errors import WeightsError
from .families import FAMILIES, Family, find_weights, weights_tables
from .files import read_state_dict
from .load import load_weights
from .table import Weights
from .unwrap import unwrap

__all__ = [
    "FAMILIES",
    "Family",
    "Weights",
    "WeightsError",
    "convert_state_dict",
    "find_weights",
    "load_weights",
    "read_state_dict",
    "unwrap",
    "weights_tables",
]
