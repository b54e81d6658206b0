"""Layer attention as pure functions, and the mixers that hold their parameters.

Shape letters, the same in every signature, einsum and test of this room: ``b`` batch, ``c = g * d`` channels,
``g`` heads, ``d`` head width, ``h w`` space, ``n`` tokens, ``t`` blocks so far, ``k`` kernel size along channels.
"""

from .backend import Backend as Backend
from .backend import chosen_path as chosen_path
from .backend import register_backend as register_backend
from .backend import use as use
from .base import LayerMemory as LayerMemory
from .base import base_update as base_update
from .base import layer_weights as layer_weights
from .base import weighted_sum as weighted_sum
from .calls import MixerCall as MixerCall
from .calls import ResidualEpilogue as ResidualEpilogue
from .contributions import Contribution as Contribution
from .contributions import UpdateNorms as UpdateNorms
from .contributions import attention_over_layers as attention_over_layers
from .exact import OutputMemory as OutputMemory
from .exact import exact_update as exact_update
from .heads import channel_kernel_size as channel_kernel_size
from .heads import resolve_heads as resolve_heads
from .layouts import Grid as Grid
from .layouts import Layout as Layout
from .layouts import from_map as from_map
from .layouts import resolve_grid as resolve_grid
from .layouts import to_map as to_map
from .light import light_gate as light_gate
from .light import light_update as light_update
from .mixers.base import MRLABase as MRLABase
from .mixers.branch import BranchMixer as BranchMixer
from .mixers.contract import ChainPlace as ChainPlace
from .mixers.contract import ChainSite as ChainSite
from .mixers.contract import LayerMixer as LayerMixer
from .mixers.depthwise import DepthwiseMixer as DepthwiseMixer
from .mixers.exact import LayerAttention as LayerAttention
from .mixers.light import MRLALight as MRLALight
from .mixers.registry import METHODS as METHODS
from .mixers.registry import NO_METHODS as NO_METHODS
from .mixers.registry import OWN_METHOD as OWN_METHOD
from .mixers.registry import is_method as is_method
from .mixers.registry import method_named as method_named
from .mixers.registry import options_of as options_of
from .mixers.registry import register_method as register_method
from .projections import depthwise_value as depthwise_value
from .torch_internals import unobserved as unobserved
