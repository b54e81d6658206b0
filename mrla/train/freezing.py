"""The first stage of fine-tuning: what is new learns, the rest of the network stays as it is."""

from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from mrla.models.parameter_groups import new_modules, new_parameters


class FrozenAtFirst(Callback):
    """Trains only new parameters in the first epochs; norms of the rest keep their statistics, and it drops nothing.

    A function of the epoch alone, so that a resumed run goes on as it would have.

    Args:
        model: The network.
        epochs: Epochs in which only what is new is trained.
        new: Patterns of names that count as new beside mixers and classifier.

    Raises:
        ValueError: If nothing of the network is new.
    """

    def __init__(self, model: nn.Module, *, epochs: int, new: Sequence[str] = ()):
        self.epochs = epochs
        fresh = new_parameters(model, new)
        if not any(parameter.requires_grad for parameter in fresh.values()):
            raise ValueError(
                f"optim.frozen_epochs={epochs} needs something to train in them: this {type(model).__name__} has "
                f"neither a mixer nor a classifier that is trainable; take 0"
            )
        self._old = [p for name, p in model.named_parameters() if name not in fresh and p.requires_grad]
        owners = {name.rpartition(".")[0] for name in fresh}
        inside = {id(module) for part in new_modules(model) for module in part.modules()}
        self._old_modules = [m for path, m in model.named_modules() if id(m) not in inside and path not in owners]
        self._put_to_eval: list[nn.Module] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch >= self.epochs:
            self._release()
            return
        self._put_to_eval = [*self._put_to_eval, *(module for module in self._old_modules if module.training)]
        for module in self._old_modules:
            module.training = False
        # Gradients that are not needed need not be computed; but DDP must know every parameter from the beginning.
        if trainer.world_size == 1:
            for parameter in self._old:
                parameter.requires_grad_(False)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if trainer.current_epoch < self.epochs:
            for parameter in self._old:  # without a gradient there is neither momentum nor weight decay
                parameter.grad = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for module in self._put_to_eval:
            module.training = True
        self._put_to_eval = []
        for parameter in self._old:
            parameter.requires_grad_(True)
