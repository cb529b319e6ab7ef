"""Trains a small GPT, letter by letter, on the source text of Python's standard library.

    python train.py                                               one process
    python -m paddle_ft.launch --nproc_per_node 2 train.py        two ranks, killed at will

The last line holds the sha256 of the weights, so that two runs can be compared bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import sysconfig
import time
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

import paddle_ft as ft

TEST_SHARE = 0.05
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""Everything else becomes a question mark."""


def read_text(chars_max: int) -> np.ndarray:
    """Letter numbers of the first characters of the standard library, files in order of name."""
    text = ""
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += file.read_text(encoding="utf-8", errors="replace")
        if len(text) >= chars_max:
            break
    number = np.full(128, ALPHABET.index("?"), dtype="int64")
    for i, letter in enumerate(ALPHABET):
        number[ord(letter)] = i
    return number[np.frombuffer(text[:chars_max].encode("ascii", "replace"), dtype=np.uint8)]


class Windows(paddle.io.Dataset):
    """Pieces of ``context`` letters, and the same moved on by one: what comes next."""

    def __init__(self, letters: np.ndarray, context: int) -> None:
        super().__init__()
        self.letters, self.context = letters, context

    def __len__(self) -> int:
        return (len(self.letters) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = index * self.context
        piece = self.letters[start : start + self.context + 1]
        return piece[:-1], piece[1:]


class Block(nn.Layer):
    """Causal self-attention and a feed-forward layer: [batch, time, width] -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        batch, time_steps, width = x.shape
        split = [batch, time_steps, 3, self.heads, width // self.heads]
        qkv = self.qkv(self.norm_attention(x)).reshape(split).transpose([2, 0, 3, 1, 4])
        query, key, value = qkv[0], qkv[1], qkv[2]
        scores = query @ key.transpose([0, 1, 3, 2]) * (width // self.heads) ** -0.5
        future = paddle.triu(paddle.full([time_steps, time_steps], -1e9), 1)
        mixed = F.softmax(scores + future) @ value
        x = x + self.out(mixed.transpose([0, 2, 1, 3]).reshape([batch, time_steps, width]))
        return x + self.feed(self.norm_feed(x))


class CharGPT(nn.Layer):
    """[batch, time] letter numbers -> [batch, time, letters] scores of the next one."""

    def __init__(self, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.context = context
        self.letter = nn.Embedding(len(ALPHABET), width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, letters: paddle.Tensor) -> paddle.Tensor:
        x = self.letter(letters) + self.place(paddle.arange(letters.shape[1]))
        return self.head(self.norm(self.blocks(x)))


@paddle.no_grad()
def evaluate(model: CharGPT, data: Windows, windows: int = 128) -> tuple[float, float]:
    """Mean loss and share of next letters that are guessed right."""
    model.eval()
    chosen = np.linspace(0, len(data) - 1, min(windows, len(data)), dtype=int)
    x, y = (np.stack(part) for part in zip(*(data[i] for i in chosen), strict=True))
    scores = model(paddle.to_tensor(x))
    right = scores.argmax(-1).numpy() == y
    return F.cross_entropy(scores, paddle.to_tensor(y)).item(), right.mean().item()


@paddle.no_grad()
def sample(model: CharGPT, start: str, letters: int, temperature: float = 0.7) -> str:
    """``start`` and what the model thinks comes after it."""
    model.eval()
    dice = np.random.default_rng(0)
    numbers = [ALPHABET.index(letter) for letter in start]
    for _ in range(letters):
        scores = model(paddle.to_tensor([numbers[-model.context :]]))[0, -1]
        chances = F.softmax(scores / temperature).numpy().astype("float64")
        numbers.append(int(dice.choice(len(ALPHABET), p=chances / chances.sum())))
    return "".join(ALPHABET[number] for number in numbers)


def weights_hash(model: nn.Layer) -> str:
    """sha256 of all parameters in the order of ``state_dict``: equal only if every bit is."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16, help="of all ranks together")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chars", type=int, default=600_000, help="how much text to read")
    parser.add_argument("--context", type=int, default=64, help="letters the model looks back")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--log-every", type=int, default=100, metavar="STEPS")
    parser.add_argument(
        "--step-delay-ms", type=float, default=0.0, help="slows training down, to watch it"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    paddle.seed(args.seed)
    letters = read_text(args.chars)
    cut = int(len(letters) * (1 - TEST_SHARE))
    train, test = Windows(letters[:cut], args.context), Windows(letters[cut:], args.context)
    model = CharGPT(args.context, args.width, args.heads, args.layers)
    steps = args.epochs * -(-len(train) // args.batch_size)
    warm_up = max(1, steps // 20)
    cosine = paddle.optimizer.lr.CosineAnnealingDecay(args.lr, T_max=max(1, steps - warm_up))
    schedule = paddle.optimizer.lr.LinearWarmup(cosine, warm_up, start_lr=0.0, end_lr=args.lr)
    optimizer = paddle.optimizer.AdamW(
        schedule,
        parameters=model.parameters(),
        weight_decay=0.01,
        grad_clip=nn.ClipGradByGlobalNorm(1.0),
    )

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
            loss, accuracy = evaluate(model, test)
            print(sample(model, "def ", letters=200))
            print(
                f"final step={s.global_step} loss={loss:.4f} accuracy={accuracy:.4f} "
                f"weights={weights_hash(model)} world={s.world_size} restarts={s.restarts}",
                flush=True,
            )


if __name__ == "__main__":
    main()
