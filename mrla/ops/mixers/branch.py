"""What all methods here share: layouts, norms, activation, scale, DropPath and the add around an update."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict, get_args

import torch
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import pad

from ..backend import select
from ..batch_norm import norm_fits, takes_batch
from ..calls import MixerCall
from ..checks import check_like
from ..contributions import Contribution, UpdateNorms
from ..layouts import Grid, Layout, from_map, to_map
from ..projections import ACTIVATIONS, Activation
from ..torch_internals import unobserved
from .contract import ChainPlace, Init, LayerMixer, check_ablation

Norm = Literal["batch", "layer", "pre_layer"]


class Fused(NamedTuple):
    """Who does all of a mixer's work.

    Attributes:
        backend: The name of a backend.
        norm: The mixer's norm, which is then not called.
    """

    backend: str
    norm: nn.BatchNorm2d


class BranchOptions(TypedDict, total=False):
    """The options that every `BranchMixer` takes; a mixer of one's own hands them on, ``**options``."""

    has_shortcut: bool
    place: ChainPlace | None
    layout: Layout
    num_prefix_tokens: int
    norm: Norm | None
    out_act: Activation | None
    drop_path: float
    init: Init
    device: torch.device | str | None
    dtype: torch.dtype | None


def factory_of(options: BranchOptions) -> dict[str, Any]:
    """Device and type of the parameters that a mixer makes itself."""
    return {"device": options.get("device"), "dtype": options.get("dtype")}


class BranchMixer(LayerMixer):
    r"""A mixer that adds a normed update to the block's output; a method says only what the update is.

    .. math:: x_t + \gamma \odot \mathrm{act}(\mathrm{norm}(o_t))

    Prefix tokens pass by. With ``norm="pre_layer"``, the released DeiT's form, the norm stands in front instead:
    :math:`x_t + \gamma \odot o_t` with o_t made of LN(x_t) and, where a shortcut is carried, LN(s_t); a prefix token
    p then becomes :math:`p + \gamma \odot \mathrm{LN}(p)`.

    A class that makes parameters of its own ends its constructor with ``self.reset_parameters()``.

    gamma is there only where the mixer is to start as the identity and no norm stands last: a zero norm weight under
    a ReLU would have a zero gradient for ever.
    """

    operator: ClassVar[Literal["light", "base"]]
    """The operator of `mrla.ops.backend.Backend` that does the mixer's work, of a class that asks for one."""

    def __init__(
        self,
        channels: int,
        *,
        uses_shortcut: bool = False,
        residual: bool = True,
        has_shortcut: bool = True,
        place: ChainPlace | None = None,
        layout: Layout = "NCHW",
        num_prefix_tokens: int = 0,
        norm: Norm | None = None,
        out_act: Activation | None = None,
        drop_path: float = 0.0,
        init: Init = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        one_of("layout", layout, get_args(Layout))
        one_of("norm", norm, (None, *get_args(Norm)))
        one_of("out_act", out_act, (None, *ACTIVATIONS))
        one_of("init", init, get_args(Init))
        if num_prefix_tokens < 0 or (num_prefix_tokens and layout != "NLC"):
            raise ValueError(
                f"num_prefix_tokens counts tokens in front of the patches, of layout 'NLC' alone: "
                f"got {num_prefix_tokens} with layout={layout!r}"
            )
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be a probability in [0, 1): got {drop_path}")
        if not residual and (init == "identity" or num_prefix_tokens):
            raise ValueError(
                f"residual=False gives the update alone, which cannot start as the identity nor pass prefix tokens by: "
                f"got init={init!r}, num_prefix_tokens={num_prefix_tokens}; use init='released' on maps"
            )
        norm = norm or ("batch" if layout == "NCHW" else "layer")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.init: Init = init
        self.place = place
        self.channels = channels
        self.layout: Layout = layout
        self.num_prefix_tokens = num_prefix_tokens
        self.out_act: Activation | None = out_act
        self.residual = residual
        self.uses_shortcut = uses_shortcut = uses_shortcut and has_shortcut
        in_front = norm == "pre_layer"
        layer_norm = LayerNorm2d if layout == "NCHW" else nn.LayerNorm
        self.input_norm = layer_norm(channels, eps=1e-6, **factory) if in_front else None
        self.shortcut_norm = layer_norm(channels, eps=1e-6, **factory) if in_front and uses_shortcut else None
        after = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}
        self.norm = None if in_front else after[norm](channels, **factory)
        needs_scale = init == "identity" and (in_front or out_act is not None)
        self.scale = nn.Parameter(torch.empty(channels, **factory)) if needs_scale else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        if type(self).__init__ is BranchMixer.__init__:  # a class that makes more draws when it has made all
            self.reset_parameters()

    @abstractmethod
    def update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """o_t and the memory for the next mixer."""

    @abstractmethod
    def reset_kernels(self, init: Init) -> None:
        """Draws what the method itself owns."""

    def forward(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "*shape"], Any]:
        """The block's new output, in x's dtype, and the memory for the next mixer."""
        normed, entering, carried = self._entering(x, shortcut, grid)
        branch, memory = self.update(entering, carried, memory)
        return self._leaving(x, normed, branch), memory

    def _entering(self, x: Tensor, shortcut: Tensor | None, grid: Grid | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What goes in, behind the norm in front where there is one; the same as a map, and the shortcut for lambda."""
        axis = 1 if self.layout == "NCHW" else -1
        if x.ndim != len(self.layout) or x.shape[axis] != self.channels:
            raise ValueError(
                f"x must be {self.layout} with c = {self.channels}, as the mixer was made for: got {tuple(x.shape)}"
            )
        if shortcut is not None:
            check_like("shortcut", (shortcut,), x)
        self._check_is_made(x)
        normed = x if self.input_norm is None else self.input_norm(x)
        carried = None
        if shortcut is not None and self.uses_shortcut:
            carried = shortcut if self.shortcut_norm is None else self.shortcut_norm(shortcut)
            carried = self._map(carried, grid)
        return normed, self._map(normed, grid), carried

    def _check_is_made(self, x: Tensor) -> None:
        """Raises where the mixer has no numbers: torch's own error on meta tensors names no mixer, or there is none."""
        if x.is_meta:
            return
        for module in (self, self.norm, self.input_norm, self.shortcut_norm):
            if module is None or "forward" in module.__dict__:  # accelerate fetches weights when that is called
                continue
            for one in (*module._parameters.values(), *module._buffers.values()):
                if one is not None and one.is_meta:
                    raise RuntimeError(
                        f"the parameters of this {type(self).__name__} of mrla must hold numbers before it is called: "
                        f"got some on the meta device, and x on {x.device}; load weights that include the mixers', or "
                        f"attach the mixers behind loading; else model.to_empty(device=...) and reset_parameters(init)"
                    )

    def _leaving(self, x: Tensor, normed: Tensor, branch: Tensor) -> Tensor:
        """The block's new output, of the update as a map."""
        if self.norm is not None:
            branch = _normed(self.norm, branch)
        if self.out_act is not None:
            branch = ACTIVATIONS[self.out_act](branch)
        branch = from_map(branch, self.layout)
        if self.num_prefix_tokens and self.input_norm is not None:
            branch = torch.cat((normed[:, : self.num_prefix_tokens].to(branch.dtype), branch), dim=1)
        elif self.num_prefix_tokens:
            branch = pad(branch, (0, 0, self.num_prefix_tokens, 0))
        if self.scale is not None:
            branch = branch * (self.scale[:, None, None] if self.layout == "NCHW" else self.scale)
        branch = self.drop_path(branch).to(x.dtype)
        return x + branch if self.residual else branch

    def contributions(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> Contribution | None:
        """What a call with these arguments would take from each block; None where the method does not tell."""
        _, entering, carried = self._entering(x, shortcut, grid)
        return self.contributions_of_update(entering, carried, memory)

    def update_norms(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        grid: Grid | None = None,
    ) -> UpdateNorms | None:
        """The norms of the terms of a call's update; None where it has but one."""
        _, entering, carried = self._entering(x, shortcut, grid)
        return self.norms_of_update(entering, carried, memory)

    def forward_ablated(
        self,
        x: Float[Tensor, "*shape"],
        shortcut: Float[Tensor, "*shape"] | None = None,
        memory: Any = None,
        *,
        lag: int | None = None,
        head: int | None = None,
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "*shape"], Any]:
        """Forward pass with one source block or head ablated; the memory for the next mixer is whole."""
        check_ablation(self, lag, head)
        normed, entering, carried = self._entering(x, shortcut, grid)
        if lag is None:
            branch, memory = self.update(entering, carried, memory)
        else:
            branch, memory = self.update_ablated(entering, carried, memory, lag)
        if head is not None:
            present = torch.arange(self.num_heads, device=branch.device) != head
            present = present.repeat_interleave(self.channels // self.num_heads)
            branch = torch.where(present[:, None, None], branch, torch.zeros_like(branch))
        return self._leaving(x, normed, branch), memory

    def contributions_of_update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> Contribution | None:
        """What `update` would take from each block."""
        return None

    def norms_of_update(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any
    ) -> UpdateNorms | None:
        """The norms of the terms of `update`."""
        return None

    def update_ablated(
        self, x: Float[Tensor, "b c h w"], shortcut: Float[Tensor, "b c h w"] | None, memory: Any, lag: int
    ) -> tuple[Float[Tensor, "b c h w"], Any]:
        """`update` without the contribution of the block `lag` before this one."""
        raise NotImplementedError(f"{type(self).__name__} reads no block before its own")

    @property
    def residual_gain(self) -> Tensor | None:
        """(c,), what multiplies o_t on its way into the block's output; None where that is no fixed number."""
        norm = self.norm
        fixed = isinstance(norm, nn.BatchNorm2d) and not takes_batch(norm) and norm.running_var is not None
        if not fixed or self.out_act is not None or not self.residual:
            return None
        assert norm is not None
        spread = (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        return (1 if self.scale is None else self.scale) * (1 if norm.weight is None else norm.weight) / spread

    @property
    def plain_norm(self) -> nn.BatchNorm2d | None:
        """The norm, where around the update is but what the kernels know: maps, a BatchNorm, DropPath, the add."""
        norm, drop_path = self.norm, self.drop_path
        if (
            self.layout == "NCHW"
            and self.residual
            and type(norm) is nn.BatchNorm2d
            and norm.weight is not None
            and norm.bias is not None
            and type(drop_path) in (DropPath, nn.Identity)
            and unobserved(norm, drop_path)
        ):
            return norm
        return None

    def fused_by(
        self,
        x: Tensor,
        shortcut: Tensor | None,
        taps: tuple[Tensor, Tensor, Tensor],
        vector: Tensor | None,
        epilogue: tuple[Tensor | None, ...] | None = None,
        values: Sequence[Tensor] = (),
        keys: Sequence[Tensor] = (),
    ) -> Fused | None:
        """The backend that does the mixer's call, where one can and all around the update is what backends know.

        Args:
            x: The block's output, or the branch of an epilogue.
            shortcut: What the block added, where it is read.
            taps: The mixer's kernels: query, key and value. Where torch would refuse the type of the value's beside the
                maps', so does this.
            vector: What else the mixer owns, one number a channel.
            epilogue: The parameters and statistics of the norm behind the branch, where the block's end is left to the
                mixer.
            values: Those of the memory.
            keys: Those of the memory.
        """
        norm = self.plain_norm
        if norm is None or x.ndim != 4 or x.shape[1] != self.channels:
            return None
        query, key, value = taps
        if shortcut is not None and shortcut.shape != x.shape:
            return None
        if vector is not None and vector.shape != x.shape[1:2]:
            return None
        if query.ndim != 3 or query.shape[:2] != (1, 1) or query.shape[2] % 2 == 0 or key.shape != query.shape:
            return None
        if value.shape != (self.channels, 1, 3, 3):
            return None
        if value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        of_norms = (norm.weight, norm.bias, norm.running_mean, norm.running_var, *(epilogue or ()))
        call = MixerCall(
            self.operator, x, shortcut, (*taps, vector, *of_norms), norm, epilogue is not None, values, keys
        )
        backend = select(call)
        if backend is None or not norm_fits(norm, x):
            return None
        return Fused(backend, norm)

    def drop_scale(self, x: Tensor) -> Tensor | None:
        """What DropPath multiplies the branch of each image with, (b,); None where it does nothing."""
        if not isinstance(self.drop_path, DropPath) or not self.drop_path.training:
            return None
        return self.drop_path(x.new_ones((x.shape[0], 1, 1, 1))).flatten().float()

    def _map(self, x: Tensor, grid: Grid | None) -> Tensor:
        return to_map(x, self.layout, num_prefix_tokens=self.num_prefix_tokens, grid=grid)

    @torch.no_grad()
    def reset_parameters(self, init: Init | None = None) -> None:
        """Draws every parameter anew, from torch's global generator.

        Args:
            init: ``"identity"``: the last norm's weight 0 (or, where no norm stands last, gamma 0), so that the mixer
                changes nothing until it is trained. ``"released"`` and ``"notebook"``: norm weights 1; the method's own
                parameters as the authors' code or the Paddle notebook starts them. None: the one that the mixer was
                made with, as FSDP and timm's `init_weights` ask for it.

        Raises:
            ValueError: If the mixer was made for another start and has no gamma to be zero.
        """
        init = self.init if init is None else init
        one_of("init", init, get_args(Init))
        without_scale = self.scale is None and (self.norm is None or self.out_act is not None)
        if init == "identity" and (without_scale or not self.residual):
            raise ValueError(
                "this mixer cannot start as the identity, having no scale to be zero or no residual: make it with "
                "init='identity' and residual=True"
            )
        for norm in (self.input_norm, self.shortcut_norm, self.norm):
            if norm is not None:
                if norm.weight is not None:
                    norm.weight.fill_(0.0 if norm is self.norm and init == "identity" and self.scale is None else 1.0)
                if norm.bias is not None:
                    norm.bias.zero_()
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_running_stats()
        if self.scale is not None:
            self.scale.fill_(0.0 if init == "identity" else 1.0)
        self.reset_kernels(init)

    def zero_grad_parameters(self) -> tuple[str, ...]:
        """Names of own parameters whose gradient is zero by the maths, whatever the data."""
        place = self.place
        if place is not None and place.index >= place.length - place.unread and self.num_prefix_tokens:
            read = ("input_norm.", "scale") if self.input_norm is not None else ()
            return tuple(name for name, _ in self.named_parameters() if not name.startswith(read))
        return self.zero_grad_kernels()

    def zero_grad_kernels(self) -> tuple[str, ...]:
        """The part of `zero_grad_parameters` that comes from the method itself."""
        return ()


def _normed(norm: nn.Module, branch: Tensor) -> Tensor:
    """The update behind the mixer's norm, which must not fail where the network itself does not.

    A BatchNorm has no variance to take of one value per channel, as of a map of one pixel of one image. It then
    normalises by its running statistics and leaves them as they are; where it keeps none, the value less its own mean
    is zero, and the bias is what comes out.
    """
    if not isinstance(norm, nn.BatchNorm2d) or not takes_batch(norm) or not _has_one_value(branch):
        return norm(branch)
    if norm.running_mean is None and norm.running_var is None:
        weight, bias = (None if one is None else one[:, None, None] for one in (norm.weight, norm.bias))
        normed = branch * 0 if weight is None else branch * 0 * weight
        return normed if bias is None else normed + bias
    # The norm is called, for its hooks; on a view, so that no other thread sees its mode change.
    view = object.__new__(type(norm))
    # torch's backward reads past statistics that are strided
    packed = {name: None if one is None else one.contiguous() for name, one in norm._buffers.items()}
    view.__dict__.update(norm.__dict__, training=False, _buffers=packed)
    return view(branch)


def _has_one_value(branch: Tensor) -> bool:
    images, _, rows, columns = branch.shape
    return images == 1 and rows == 1 and columns == 1  # one by one: dynamic sizes are not compared with one another


def one_of(name: str, given: Any, allowed: tuple[Any, ...]) -> Any:
    """`given`, or a ValueError that says what it may be."""
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}: got {given!r}")
    return given


def runs_its_class(mixer: LayerMixer) -> bool:
    """Whether no method that kernels do the work of has been put in the place of the class's own."""
    own = mixer.__dict__
    # One by one: the dynamo of torch 2.11 follows no method of a module's __dict__.
    return not ("forward" in own or "update" in own or "forward_fused" in own or "drop_scale" in own)
