"""Layer attention as pure functions, and the mixers that hold their parameters.

Shape letters, the same in every signature, einsum and test of this room: ``b`` batch, ``c = g * d`` channels,
``g`` heads, ``d`` head width, ``h w`` space, ``n`` tokens, ``t`` blocks so far, ``k`` kernel size along channels.
"""

from ._base import LayerMemory as LayerMemory
from ._base import base_update as base_update
from ._base import layer_weights as layer_weights
from ._base import weighted_sum as weighted_sum
from ._block_tail import BlockTail as BlockTail
from ._branch import BranchMixer as BranchMixer
from ._branch import unobserved as unobserved
from ._contract import ChainPlace as ChainPlace
from ._contract import LayerMixer as LayerMixer
from ._exact import OutputMemory as OutputMemory
from ._exact import exact_update as exact_update
from ._heads import channel_kernel_size as channel_kernel_size
from ._heads import resolve_heads as resolve_heads
from ._hearing import Heard as Heard
from ._hearing import Terms as Terms
from ._hearing import retrieval as retrieval
from ._layouts import Grid as Grid
from ._layouts import Layout as Layout
from ._layouts import from_map as from_map
from ._layouts import resolve_grid as resolve_grid
from ._layouts import to_map as to_map
from ._light import light_gate as light_gate
from ._light import light_update as light_update
from ._mixers import METHODS as METHODS
from ._mixers import DepthwiseMixer as DepthwiseMixer
from ._mixers import LayerAttention as LayerAttention
from ._mixers import MRLABase as MRLABase
from ._mixers import MRLALight as MRLALight
from ._projections import depthwise_value as depthwise_value
from ._selection import chosen_path as chosen_path
from ._selection import use as use
