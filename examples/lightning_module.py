"""Lightning; its checkpoints hold the adapter:  python examples/lightning_module.py OUT"""

from typing import Any

import lightning
import torch
from common import BATCH, LR, digits, output, prompted
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Prompted(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # without it each checkpoint would hold the whole backbone, too
        self.model = prompted()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.trainable_parameters(), lr=LR)


folder = output()
trainer = lightning.Trainer(
    max_epochs=1,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
module = Prompted()
trainer.fit(module, DataLoader(TensorDataset(*digits()), batch_size=BATCH))
trainer.save_checkpoint(f"{folder}.ckpt")
module.model.save_pretrained(folder)
