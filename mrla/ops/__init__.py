"""Layer attention as pure functions, and the mixers that hold their parameters.

Shape letters, the same in every signature, einsum and test of this room:
``b`` batch, ``c = g * d`` channels, ``g`` heads, ``d`` head width, ``h w`` space, ``k`` kernel size along channels.
"""

from ._heads import channel_kernel_size as channel_kernel_size
from ._heads import resolve_heads as resolve_heads
from ._light import light_gate as light_gate
from ._light import light_update as light_update
from ._mixers import METHODS as METHODS
from ._mixers import ChainPlace as ChainPlace
from ._mixers import DepthwiseMixer as DepthwiseMixer
from ._mixers import LayerMixer as LayerMixer
from ._mixers import MRLALight as MRLALight
