"""Times of several activities, added up in minutes; the level is how many activities there are.

user:      Ann swims for 1 hour and 20 minutes and reads for 40 minutes. How many minutes is that?
reasoning: 1*60=60
           60+20=80
           80+40=120
answer:    120
"""

import random
from collections.abc import Callable, Sequence

from hgpo_trl.tasks.embedded import Query
from hgpo_trl.tasks.english.wording import NAMES, choose_pattern, domain_name, listed

LEVELS = {1: 3, 2: 3, 3: 2, 4: 1}

_ACTIVITIES = "swims reads walks sings cooks runs draws sleeps works plays".split()


def _spell(minutes: int) -> str:
    """ "40 minutes", "2 hours", "1 hour and 20 minutes"."""
    hours, rest = divmod(minutes, 60)
    parts = [f"{hours} hour{'s' * (hours > 1)}"] * (hours > 0) + [f"{rest} minutes"] * (rest > 0)
    return " and ".join(parts)


_PATTERNS: tuple[Callable[[str, str, Sequence[str]], str], ...] = (
    lambda done, name, times: f"{name} {done}. How many minutes is that?",
    lambda done, name, times: f"Today {name} {done}. How many minutes does it take in total?",
    lambda done, name, times: f"How many minutes are {listed(times)}?",
    lambda done, name, times: f"{name} plans: {', then '.join(times)}. Give the total in minutes.",
    lambda done, name, times: f"In the evening {name} {done}. What is the whole time in minutes?",
    lambda done, name, times: f"Convert to minutes and add: {'; '.join(times)}.",
)


def sample(level: int, rng: random.Random, patterns: str = "all") -> Query:
    """Draw one query with `level` times in tens of minutes: the first from 1:10 to 3:50 hours, others below 1:00."""
    phrase, is_other = choose_pattern(_PATTERNS, patterns, rng)
    times = [60 * rng.randint(1, 3) + 10 * rng.randint(1, 5)]
    times += [10 * rng.randint(1, 5) for _ in range(level - 1)]
    hours, rest = divmod(times[0], 60)
    steps, total = [f"{hours}*60={60 * hours}", f"{60 * hours}+{rest}={times[0]}"], times[0]
    for time in times[1:]:
        steps.append(f"{total}+{time}={total + time}")
        total += time
    spelled = [_spell(time) for time in times]
    activities = rng.sample(_ACTIVITIES, level)
    done = listed([f"{verb} for {time}" for verb, time in zip(activities, spelled, strict=True)])
    question = phrase(done, rng.choice(NAMES), spelled)
    return Query(question, "\n".join(steps), str(total), level, domain_name("minutes", is_other))
