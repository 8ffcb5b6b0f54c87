"""PyTorch, eager or through `torch.compile`, in channels-last order as its CPU tuning guide advises; bfloat16 by autocast."""

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from benchmarks.peers import session


class Network(nn.Module):
    """The article's network; images [b, 1, 28, 28] to logits [b, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding="same"), nn.ReLU(), nn.BatchNorm2d(32), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding="same"), nn.ReLU(), nn.BatchNorm2d(64), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(7 * 7 * 64, 128), nn.ReLU(), nn.Dropout(session.DROPOUT_RATE), nn.Linear(128, 10),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.layers(images)


def main() -> None:
    """Prints JSON."""
    options = session.parse(__doc__, ("eager", "compiled", "max_autotune"))
    images, labels = (torch.from_numpy(array) for array in session.examples(options))
    dataset = TensorDataset(images.permute(0, 3, 1, 2), labels)
    # Whole batches are indexed at once: far quicker than collating single examples.
    sampler = BatchSampler(RandomSampler(dataset), options.batch, drop_last=True)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)
    model = Network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=session.LEARNING_RATE, fused=True)
    criterion = nn.CrossEntropyLoss()
    forward = model
    if options.variant == "compiled":
        forward = torch.compile(model)
    elif options.variant == "max_autotune":
        forward = torch.compile(model, mode="max-autotune")

    def train_epoch() -> float:
        total = torch.zeros(())
        model.train()
        for batch, targets in loader:
            batch = batch.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
                loss = criterion(forward(batch), targets)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total) / len(loader)

    session.run(options, {"torch": torch.__version__}, train_epoch)


if __name__ == "__main__":
    main()
