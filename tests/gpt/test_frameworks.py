"""A training step of `gpt.GPT` in Lightning and in Accelerate; the answer to Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.gpt.models import random_model, tokens


def batches() -> DataLoader[Any]:
    return DataLoader([(tokens(1, 8)[0], tokens(1, 8)[0]) for _ in range(2)], batch_size=2)


def one_step(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters after one step of SGD on `batches`, in plain PyTorch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (idx, targets), *_ = batches()
    model(idx, targets).backward()
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def expected() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = random_model()
    torch.manual_seed(1)
    return one_step(model)


# Lightning asks torch for the type of a leaf in a way that torch deprecates.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_a_step_in_lightning(tmp_path: Path) -> None:
    """A model that Lightning cannot wrap, move or train, or that it trains otherwise than a plain loop."""
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = random_model()

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return self.model(*batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    module = Module()
    torch.manual_seed(1)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=1, barebones=True, default_root_dir=tmp_path)
    trainer.fit(module, batches())
    assert trainer.global_step == 1
    torch.testing.assert_close(dict(module.model.named_parameters()), expected())


def test_a_step_in_accelerate() -> None:
    """A model that Accelerate cannot prepare, or that it trains otherwise than a plain loop."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(0)
    model = random_model()
    torch.manual_seed(1)
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.1), batches()
        )
        for idx, targets in loader:
            accelerator.backward(model(idx, targets))
            optimizer.step()
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.testing.assert_close(dict(accelerator.unwrap_model(model).named_parameters()), expected())


def test_hugging_faces_trainer_is_answered(tmp_path: Path) -> None:
    """An error deep inside transformers that does not say how its Trainer can train the model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    arguments = transformers.TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[])
    with pytest.raises(
        AttributeError, match=r"format='huggingface'.*integrations\.transformers\.fuse"
    ) as caught:
        transformers.Trainer(model=random_model(), args=arguments)
    assert "\n" not in str(caught.value)
