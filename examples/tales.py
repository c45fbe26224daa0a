"""Text to train the demo on: little tales told by a small grammar.

Every tale keeps its own books: who has how many of what, and where. A model that writes good
tales has to look back for the name, the thing and the number, which is what attention is for.
"""

import random

NAMES = "Mara Odo Ilse Bram Tove Jonas Petra Anselm Wren Lotte Caspar Edda".split()
TRADES = "baker miller ferryman weaver cooper gardener clockmaker shepherd".split()
THINGS = "pears candles buttons eggs walnuts lanterns plums ribbons spoons kettles".split()
PLACES = "the mill, the harbour, the old bridge, the orchard, the market, the chapel".split(", ")
HOLDERS = "a blue jar, a tin box, a willow basket, the top drawer, a linen sack".split(", ")
TIMES = "At dawn, At noon, In the evening, Before the rain came, After supper".split(", ")
WEATHER = [
    "The wind came down from the hills.",
    "It had rained all night and the lanes were soft.",
    "The river was high and brown.",
    "Frost lay on the roofs until midday.",
    "Nobody could remember a warmer spring.",
]
NUMBERS = (
    "no one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen"
).split()


def gift(rng: random.Random) -> str:
    giver, taker = rng.sample(NAMES, 2)
    had = rng.randint(3, 12)
    gave = rng.randint(1, had - 1)
    thing, holder = rng.choice(THINGS), rng.choice(HOLDERS)
    return (
        f"{giver} the {rng.choice(TRADES)} kept {NUMBERS[had]} {thing} in {holder}. "
        f"{rng.choice(TIMES)} {taker} came by and asked for {NUMBERS[gave]} of them. "
        f"{giver} counted them out on the table. "
        f"Then {giver} had {NUMBERS[had - gave]} {thing} left in {holder}, "
        f"and {taker} went home with {NUMBERS[gave]}."
    )


def find(rng: random.Random) -> str:
    name = rng.choice(NAMES)
    first, second = rng.randint(1, 8), rng.randint(1, 8)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    return (
        f"{rng.choice(WEATHER)} On the way to {place} {name} found {NUMBERS[first]} {thing}, "
        f"and near {place} {NUMBERS[second]} more. "
        f'"That makes {NUMBERS[first + second]} {thing}," said {name}, and walked on.'
    )


def search(rng: random.Random) -> str:
    seeker, hidden = rng.sample(NAMES, 2)
    wrong, right = rng.sample(PLACES, 2)
    return (
        f"{seeker} the {rng.choice(TRADES)} was looking for {hidden}. "
        f"{hidden} was not at {wrong}. {rng.choice(WEATHER)} "
        f"{rng.choice(TIMES)} {seeker} tried {right}, and there sat {hidden}. "
        f'"I looked for you at {wrong}," said {seeker}. '
        f'"I was at {right} all day," said {hidden}.'
    )


def trade(rng: random.Random) -> str:
    one, other = rng.sample(NAMES, 2)
    mine, yours = rng.sample(THINGS, 2)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return (
        f"{rng.choice(TIMES)} {one} brought {NUMBERS[a]} {mine} to {rng.choice(PLACES)}, "
        f"and {other} brought {NUMBERS[b]} {yours}. They agreed to trade. "
        f"{one} went home with {NUMBERS[b]} {yours} and {other} with {NUMBERS[a]} {mine}."
    )


def tales(count: int, seed: int = 0) -> list[str]:
    """`count` tales; the same ones for the same seed."""
    rng = random.Random(seed)
    return [rng.choice((gift, find, search, trade))(rng) for _ in range(count)]
