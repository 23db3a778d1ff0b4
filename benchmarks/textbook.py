"""The memo's experiment as a person writes it by hand: the yardstick. Nothing here is tuned or used by the service."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from sklearn.datasets import make_regression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train(epochs: int = 60, width: int = 64, seed: int = 0, batch: int = 16, *, measure: bool = True) -> Any:
    """Singular values of the second weight after every epoch, (epochs + 1, width), or only at first."""
    torch.manual_seed(seed)
    inputs, z = make_regression(1000, 20, n_informative=5, n_targets=4, random_state=seed)
    x = torch.tensor(inputs, dtype=torch.float32)[:800]
    y = torch.tanh(torch.tensor(z / z.std(axis=0), dtype=torch.float32))[:800]
    middle = nn.Linear(width, width)
    network = nn.Sequential(nn.Linear(20, width), nn.Tanh(), middle, nn.Tanh(), nn.Linear(width, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, weight_decay=5e-3)
    spectra = [torch.linalg.svdvals(middle.weight.detach()).numpy()]
    for _ in range(epochs):
        for x_batch, y_batch in DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(network(x_batch), y_batch).backward()
            optimizer.step()
        if measure:
            spectra.append(torch.linalg.svdvals(middle.weight.detach()).numpy())
    return np.array(spectra)


def draw(spectra: Any, path: Path) -> None:
    """The animation of the normalised spectra by FuncAnimation and PillowWriter."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415  (the backend has to be chosen first)

    shares = spectra / spectra.sum(axis=1, keepdims=True)
    figure, axes = plt.subplots()

    def frame(epoch: int) -> None:
        axes.clear()
        axes.plot(shares[epoch], "o-")
        axes.set(ylim=(0, shares.max()), title=f"epoch {epoch}", xlabel="j", ylabel="normalised singular value")

    FuncAnimation(figure, frame, frames=len(shares)).save(path, writer=PillowWriter(fps=10))
    plt.close(figure)
