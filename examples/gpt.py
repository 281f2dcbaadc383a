"""A small GPT over bytes, and a text for it to learn."""

import random

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 128  # ASCII


def sentences(count: int = 2000, seed: int = 0) -> str:
    """English enough to have something to learn in it; the same text every time."""
    chance = random.Random(seed)
    subjects = ["the cat", "a ship", "my neighbour", "the old tree", "every child", "one star"]
    verbs = ["sees", "follows", "remembers", "paints", "loses", "finds"]
    objects = ["a river", "the moon", "some bread", "an open door", "the road home", "its shadow"]
    return " ".join(f"{chance.choice(subjects)} {chance.choice(verbs)} {chance.choice(objects)}." for _ in range(count))


def tokens_of(text: str) -> torch.Tensor:
    return torch.tensor([min(ord(letter), VOCABULARY - 1) for letter in text])


class Batches:
    """Random windows of a text: (tokens, the tokens that follow them)."""

    def __init__(self, tokens: torch.Tensor, size: int, context: int, seed: int):
        self._tokens, self._size, self._context = tokens, size, context
        self._chance = torch.Generator().manual_seed(seed)

    def next(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(self._tokens) - self._context, (self._size, 1), generator=self._chance)
        windows = self._tokens[starts + torch.arange(self._context + 1)].to(device)
        return windows[:, :-1], windows[:, 1:]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.queries_keys_values(x).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.before_attention, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, context: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))
