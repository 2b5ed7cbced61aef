"""Libraries that change a model in the middle of a training: the penalty follows what they leave."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tests.real_models  # noqa: F401  torchvision's operators, which a CPU build of torch lacks
from lightning_hsu import HypersphericalUniformity, UniformityRegularizer
from tests.models import trainer

pytestmark = [
    pytest.mark.models,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:the penalty is too strong",  # in adapters, whose weights are small
    ),
]

OPTIONS = {"coefficient": 0.1, "head": None, "exclude": "*embeddings*", "step_limit": None}
TOKENS = 64


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=TOKENS,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


class Classifier(pl.LightningModule):
    """Trains a BERT; a library changes it at the start of the second epoch, or of the second and third."""

    def __init__(self, *changes):
        super().__init__()
        self.model = bert()
        self.changes = changes

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3)

    def on_train_epoch_start(self):
        if 1 <= self.current_epoch <= len(self.changes):
            self.model = self.changes[self.current_epoch - 1](self.model)
            self.trainer.strategy.optimizers = [self.configure_optimizers()]


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = get_peft_model(model, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def merged(model):
    return model.merge_and_unload().requires_grad_(True)


def with_two_adapters(model):
    from peft import LoraConfig

    model = with_lora(model)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model.add_adapter("second", config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def switched(model):
    model.set_adapter("second")
    return model


def cut_by_half(model):
    """Structured pruning: fewer neurons, in new parameters."""
    import torch_pruning

    kept = [model.classifier, model.bert.pooler]
    kept += [layer.attention for layer in model.bert.encoder.layer]
    model.eval()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        {"input_ids": torch.zeros(1, 8, dtype=torch.long)},
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=kept,
        root_module_types=[nn.Linear],
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    return model.train()


def for_quantisation(model):
    """Training for quantisation: each Linear is replaced by one that rounds."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(
        model.bert.encoder, QATConfig(Int8DynamicActivationIntxWeightConfig(), step="prepare")
    )
    return model


def with_more_tokens(model):
    model.resize_token_embeddings(TOKENS + 16)
    return model


CHANGES = {
    "peft adds LoRA": [with_lora],
    "peft merges LoRA": [with_lora, merged],
    "peft switches adapters": [with_two_adapters, switched],
    "torch_pruning": [cut_by_half],
    "torchao prepares": [for_quantisation],
    "transformers resizes": [with_more_tokens],
}


class Before(pl.Callback):
    """Keeps the task's gradients."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.grads = {name: p.grad.clone() for name, p in named if p.grad is not None}


class After(pl.Callback):
    """Compares what was added with what a regularizer adds that sees the model for the first time."""

    def __init__(self, before):
        self.before = before
        self.layers = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        twin = copy.deepcopy(pl_module)
        twin.trainer = None
        for name, p in twin.named_parameters():
            p.grad = torch.zeros_like(p) if name in self.before.grads else None
        fresh = UniformityRegularizer(**OPTIONS)
        with warnings.catch_warnings():
            fresh.attach(twin.model)
        settings = {key: value for key, value in optimizer.defaults.items() if key == "lr"}
        fresh.add_gradients(torch.optim.SGD(twin.parameters(), **settings))
        expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        for name, p in pl_module.named_parameters():
            if p.grad is None:
                continue
            added = p.grad - self.before.grads[name]
            torch.testing.assert_close(added, expected[name], rtol=1e-3, atol=1e-6)
        changed = sum(bool(x.any()) for x in expected.values())
        self.layers.append((len(fresh.layers), changed))


@pytest.mark.parametrize("name", CHANGES)
def test_the_penalty_follows(name, caplog):
    tokens = torch.randint(0, TOKENS, (24, 8), generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(tokens, torch.arange(24) % 3), batch_size=8)
    before = Before()
    after = After(before)
    callback = HypersphericalUniformity(**OPTIONS)
    module = Classifier(*CHANGES[name])
    fit = trainer(before, callback, after, max_epochs=len(CHANGES[name]) + 1)
    fit.fit(module, data)
    assert len(after.layers) == fit.global_step == 3 * (len(CHANGES[name]) + 1)
    assert all(measured > 10 and changed > 1 for measured, changed in after.layers)
    told = [text for text in caplog.messages if "the model has changed" in text]
    same_weights = name in ("torchao prepares", "transformers resizes")  # of what is measured
    assert len(told) == (0 if same_weights else len(CHANGES[name]))
