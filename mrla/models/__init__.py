"""Mixers in backbones: attach and detach, named models, saving and loading."""

from .attachment import attach as attach
from .attachment import attach_recipe as attach_recipe
from .attachment import detach as detach
from .attachment import is_attached as is_attached
from .chain_search import Chain as Chain
from .chain_search import find_chains as find_chains
from .checkpoints import build as build
from .checkpoints import is_saved as is_saved
from .checkpoints import load as load
from .checkpoints import network_arguments as network_arguments
from .checkpoints import read_config as read_config
from .checkpoints import save as save
from .hub import push as push
from .initialisation import initialise_as_notebook as initialise_as_notebook
from .named_deits import build_deit as build_deit
from .named_efficientnets import build_efficientnet as build_efficientnet
from .named_pvts import build_pvt as build_pvt
from .named_resnets import build_resnet as build_resnet
from .parameter_groups import param_groups as param_groups
from .references import REFERENCES as REFERENCES
from .references import convert as convert
from .references import load_reference as load_reference
from .registration import NAMED as NAMED
from .stage import Stage as Stage
