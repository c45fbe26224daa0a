"""The token sequences that `fxport.verify` asks: random ones, and ones that break things."""

from __future__ import annotations

import torch

__all__ = ["prompts_for"]


def prompts_for(vocab_size: int, limit: int, new_tokens: int, seed: int) -> list[list[int]]:
    """Prompts whose continuation by `new_tokens` stays within `limit`.

    Lengths 1, 2, 3 and on to the longest possible (at most 200); the same token again and again;
    the first and the last token of the vocabulary; two prompts with a common beginning, longer
    than a block of vLLM's cache, and one that goes on where another ends.
    """
    longest = max(1, min(limit - new_tokens, 200))
    generator = torch.Generator().manual_seed(seed)

    def random(length: int) -> list[int]:
        ids = torch.randint(0, vocab_size, (max(1, min(length, longest)),), generator=generator)
        return [int(i) for i in ids]

    found = [random(n) for n in (1, 2, 3, 17, longest // 2, longest)]
    beginning = random(40)[: max(1, longest - 9)]
    found += [beginning + random(5)[: longest - len(beginning)] for _ in range(2)]
    found.append((beginning + random(9))[:longest])
    found += [[0], [vocab_size - 1] * min(5, longest), [vocab_size // 2] * min(33, longest)]
    found.append([(i * 7919) % vocab_size for i in range(min(23, longest))])
    return list(map(list, dict.fromkeys(map(tuple, found))))
