"""Shopping: what several things cost together; the level is how many kinds of things are bought.

user:      A pen costs 3 dollars and a book costs 5 dollars. Ben buys 2 pens and 4 books. How much does Ben pay?
reasoning: 2*3=6
           4*5=20
           6+20=26
answer:    26
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hgpo_trl.tasks.embedded import Query
from hgpo_trl.tasks.english.wording import NAMES, choose_pattern, counted, domain_name, listed, sum_of_products

LEVELS = {1: 3, 2: 3, 3: 2, 4: 1}

_GOODS = "pen book cup hat ball lamp bag ticket cake melon shirt toy plate rope flute map".split()


@dataclass(frozen=True, slots=True)
class _Item:
    noun: str
    count: int
    price: int

    @property
    def bought(self) -> str:
        return counted(self.count, self.noun)


def _prices(items: Sequence[_Item]) -> str:
    return listed([f"a {item.noun} costs {item.price} dollars" for item in items])


def _bought(items: Sequence[_Item]) -> str:
    return listed([item.bought for item in items])


def _priced(items: Sequence[_Item]) -> str:
    return listed([f"{item.bought} at {item.price} dollars each" for item in items])


def _prices_first(items: Sequence[_Item], name: str) -> str:
    prices = _prices(items)
    return f"{prices[0].upper()}{prices[1:]}. {name} buys {_bought(items)}. How much does {name} pay?"


def _buys_at(items: Sequence[_Item], name: str) -> str:
    return f"{name} buys {_priced(items)}. What is the total price?"


def _how_much(items: Sequence[_Item], name: str) -> str:
    return f"How much are {_priced(items)}?"


def _wants(items: Sequence[_Item], name: str) -> str:
    return f"{name} wants {_bought(items)}. In the shop {_prices(items)}. How many dollars does {name} need?"


def _bill(items: Sequence[_Item], name: str) -> str:
    return f"The bill lists {_priced(items)}. What does it come to?"


def _spends(items: Sequence[_Item], name: str) -> str:
    return f"At the market {_prices(items)}. {name} takes {_bought(items)}. What does {name} spend?"


_PATTERNS: tuple[Callable[[Sequence[_Item], str], str], ...] = (
    _prices_first,
    _buys_at,
    _how_much,
    _wants,
    _bill,
    _spends,
)


def sample(level: int, rng: random.Random, patterns: str = "all") -> Query:
    """Draw one query with `level` kinds of things, 2 to 4 of each, at 2 to 6 dollars."""
    phrase, is_other = choose_pattern(_PATTERNS, patterns, rng)
    items = [_Item(noun, rng.randint(2, 4), rng.randint(2, 6)) for noun in rng.sample(_GOODS, level)]
    reasoning, total = sum_of_products([(item.count, item.price) for item in items])
    return Query(phrase(items, rng.choice(NAMES)), reasoning, str(total), level, domain_name("shopping", is_other))
