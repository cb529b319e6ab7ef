"""Trains a small CNN on scikit-learn's handwritten digits (1,797 real scans of 8x8 pixels).

    python train.py                                               one process
    python -m paddle_ft.launch --nproc_per_node 2 train.py        two ranks, killed at will
    python -m paddle_ft.launch --nproc_per_node 2 --then-serve '--model digits' \\
        train.py --publish digits                                 served afterwards: see ask.py

The last line holds the sha256 of the weights, so that two runs can be compared bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import time

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F
from paddle.static import InputSpec
from sklearn.datasets import load_digits

import paddle_ft as ft

TEST_SAMPLES = 360


class Digits(paddle.io.Dataset):
    """Images [1, 8, 8] in 0..1 and their labels; the split into training and test is fixed."""

    def __init__(self, train: bool) -> None:
        super().__init__()
        data = load_digits()
        order = np.random.default_rng(0).permutation(len(data.target))
        part = order[TEST_SAMPLES:] if train else order[:TEST_SAMPLES]
        self.images = (data.images[part, None] / 16.0).astype("float32")
        self.labels = data.target[part].astype("int64")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int64]:
        return self.images[index], self.labels[index]


def convolution(inputs: int, outputs: int) -> list[nn.Layer]:
    return [
        nn.Conv2D(inputs, outputs, 3, padding=1, bias_attr=False),
        nn.BatchNorm2D(outputs),
        nn.ReLU(),
    ]


def make_model() -> nn.Layer:
    """[batch, 1, 8, 8] -> [batch, 10]; some 15,600 parameters."""
    return nn.Sequential(
        *convolution(1, 16),
        *convolution(16, 32),
        nn.MaxPool2D(2),
        *convolution(32, 32),
        nn.MaxPool2D(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 2 * 2, 10),
    )


@paddle.no_grad()
def evaluate(model: nn.Layer, data: Digits) -> tuple[float, float]:
    """Mean loss and share of right answers."""
    model.eval()
    labels = paddle.to_tensor(data.labels)
    answers = model(paddle.to_tensor(data.images))
    right = answers.argmax(-1).numpy() == data.labels
    return F.cross_entropy(answers, labels).item(), right.mean().item()


def weights_hash(model: nn.Layer) -> str:
    """sha256 of all parameters in the order of ``state_dict``: equal only if every bit is."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64, help="of all ranks together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--publish", metavar="NAME", help="as the next version of model NAME")
    parser.add_argument(
        "--step-delay-ms", type=float, default=0.0, help="slows training down, to watch it"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    paddle.seed(args.seed)
    train = Digits(train=True)
    model = make_model()
    steps = args.epochs * -(-len(train) // args.batch_size)
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(args.lr, T_max=steps)
    optimizer = paddle.optimizer.AdamW(schedule, parameters=model.parameters(), weight_decay=1e-4)

    with ft.session(model=model, optimizer=optimizer, lr_scheduler=schedule) as s:
        for x, y in s.batches(
            train, batch_size=args.batch_size, epochs=args.epochs, shuffle=True, seed=args.seed
        ):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            s.step(loss)
            if s.rank == 0 and s.global_step % args.log_every == 0:
                print(f"step {s.global_step} of {steps}", flush=True)
            time.sleep(args.step_delay_ms / 1000)

        if s.rank == 0:
            loss, accuracy = evaluate(model, Digits(train=False))
            print(
                f"final step={s.global_step} loss={loss:.4f} accuracy={accuracy:.4f} "
                f"weights={weights_hash(model)} world={s.world_size} restarts={s.restarts}",
                flush=True,
            )
        if args.publish:
            s.publish(args.publish, [InputSpec([None, 1, 8, 8], "float32", "image")])


if __name__ == "__main__":
    main()
