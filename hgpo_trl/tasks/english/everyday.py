"""Everyday requests that need no reasoning: level 1 has one right answer, level 2 is open.

    user:      What is the capital of France?          Write a short thank-you note to Ann.
    answer:    Paris                                   Dear Ann, thank you so much for your help. ...

They have no trace: examples of the no-think mode alone. Level 1 can be scored against its answer in Stage II.
"""

import random
from collections.abc import Callable, Sequence

from hgpo_trl.tasks.embedded import Query
from hgpo_trl.tasks.english.wording import NAMES, choose_pattern, domain_name, listed

LEVELS = {1: 1, 2: 1}

_CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin",
    "Hungary": "Budapest", "Russia": "Moscow", "Turkey": "Ankara", "Canada": "Ottawa", "Cuba": "Havana",
    "Peru": "Lima", "Kenya": "Nairobi", "Thailand": "Bangkok", "Belgium": "Brussels", "Argentina": "Buenos Aires",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "happy": "sad", "early": "late", "open": "closed", "old": "young",
    "hard": "soft", "light": "dark", "full": "empty", "high": "low", "wet": "dry", "rich": "poor", "strong": "weak",
    "long": "short", "loud": "quiet", "clean": "dirty", "left": "right", "up": "down", "day": "night",
}  # fmt: skip
_PLURALS = {
    "child": "children", "mouse": "mice", "foot": "feet", "tooth": "teeth", "man": "men", "woman": "women",
    "goose": "geese", "city": "cities", "leaf": "leaves", "box": "boxes", "knife": "knives", "baby": "babies",
}  # fmt: skip
_PAST = {
    "go": "went", "eat": "ate", "see": "saw", "run": "ran", "write": "wrote", "sing": "sang", "buy": "bought",
    "take": "took", "give": "gave", "find": "found", "come": "came", "think": "thought", "swim": "swam",
}  # fmt: skip
_LISTS = {
    "fruits": "apple banana orange pear grape mango cherry peach".split(),
    "colors": "red blue green yellow orange purple white black".split(),
    "animals": "dog cat horse elephant tiger rabbit eagle dolphin".split(),
    "vegetables": "carrot potato tomato onion spinach cabbage pepper".split(),
    "sports": "football tennis swimming running basketball cycling golf".split(),
    "instruments": "piano violin guitar flute drums trumpet cello".split(),
}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_OCCASIONS = {
    "thank-you note": "Dear {name}, thank you so much for your help. It meant a lot to me. Best wishes!",
    "birthday wish": "Happy birthday, {name}! I hope your day is full of joy and good company.",
    "invitation to dinner": "Dear {name}, would you like to come to dinner on Friday at seven? See you soon!",
    "get-well message": "Dear {name}, I hope you feel better soon. Take good care of yourself.",
    "good-night message": "Good night, {name}! Sleep well and have sweet dreams.",
    "apology": "Dear {name}, I am sorry for being late yesterday. It will not happen again.",
    "welcome message": "Welcome, {name}! We are glad that you are here. Let us know if you need anything.",
}
_EXPLANATIONS = {
    "rain": "Water rises from seas and lakes as vapor, cools into clouds, and falls back as drops.",
    "a library": "A library is a place where people can read and borrow books.",
    "photosynthesis": "Plants use sunlight, water and carbon dioxide to make sugar and oxygen.",
    "a bicycle": "A bicycle is a vehicle with two wheels that you move by pushing pedals.",
    "gravity": "Gravity is the force that pulls objects toward each other, such as a ball toward the ground.",
    "a compass": "A compass is a tool whose needle points north and helps you find your way.",
    "the moon": "The moon is a ball of rock that travels around the Earth about once a month.",
    "friendship": "Friendship is a bond between people who like, trust and help each other.",
    "bread": "Bread is a food made of flour, water and yeast that is baked in an oven.",
    "a volcano": "A volcano is an opening in the ground where melted rock and gas come out.",
}
_ADVICE = {
    "sleep better": "Go to bed at the same time every day, keep the room dark, and avoid screens before sleep.",
    "learn a language": "Practice a little every day, listen to native speakers, and do not fear mistakes.",
    "save money": "Write down what you spend, cook at home, and put some money aside every month.",
    "stay healthy": "Eat vegetables, move every day, drink water, and sleep enough.",
    "make new friends": "Join a club, be kind, ask questions, and listen to the answers.",
    "write a good letter": "Begin with a greeting, say clearly what you want, and end with kind words.",
    "prepare for a trip": "Make a list, check the weather, pack early, and keep your papers at hand.",
}


def _definite(rng: random.Random) -> tuple[Sequence[str], str]:
    """Several wordings of a question, and its answer."""
    kind = rng.randrange(4)
    word, answer = rng.choice(list((_CAPITALS, _OPPOSITES, _PLURALS, _PAST)[kind].items()))
    name = (f"capital of {word}", f"opposite of {word}", f"plural of {word}", f"past tense of {word}")[kind]
    return [
        f"What is the {name}?",
        f"Tell me the {name}.",
        f"Do you know the {name}?",
        f"Name the {name}.",
        f"I need the {name}. What is it?",
        f"Please give me the {name}.",
    ], answer


def _list(rng: random.Random) -> tuple[Sequence[str], str]:
    kind, number = rng.choice(list(_LISTS)), rng.choice(list(_NUMBERS))
    count = _NUMBERS[number]
    return [
        f"Name {count} {kind}.",
        f"List {count} {kind}.",
        f"Give me {count} {kind}.",
        f"Can you think of {count} {kind}?",
        f"Which {count} {kind} do you know?",
        f"I need the names of {count} {kind}.",
    ], listed(rng.sample(_LISTS[kind], number)).capitalize() + "."


def _note(rng: random.Random) -> tuple[Sequence[str], str]:
    occasion, name = rng.choice(list(_OCCASIONS)), rng.choice(NAMES)
    article = "an" if occasion[0] in "aeiou" else "a"
    return [
        f"Write {article} {occasion} for {name}.",
        f"Please write {article} {occasion} to {name}.",
        f"I want to send {name} {article} {occasion}. What can I write?",
        f"Help me with {article} {occasion} for {name}.",
        f"Compose {article} {occasion} for my friend {name}.",
        f"Draft {article} {occasion} to {name}.",
    ], _OCCASIONS[occasion].format(name=name)


def _explanation(rng: random.Random) -> tuple[Sequence[str], str]:
    thing, answer = rng.choice(list(_EXPLANATIONS.items()))
    return [
        f"Explain {thing} in one sentence.",
        f"What is {thing}?",
        f"Describe {thing} briefly.",
        f"How would you explain {thing} to a child?",
        f"Tell me something about {thing}.",
        f"Give a short description of {thing}.",
    ], answer


def _advice(rng: random.Random) -> tuple[Sequence[str], str]:
    goal, answer = rng.choice(list(_ADVICE.items()))
    return [
        f"How can I {goal}?",
        f"Give me some tips to {goal}.",
        f"What helps to {goal}?",
        f"I would like to {goal}. Any advice?",
        f"Suggest a few ways to {goal}.",
        f"What should I do to {goal}?",
    ], answer


_OPEN: tuple[Callable[[random.Random], tuple[Sequence[str], str]], ...] = (_list, _note, _explanation, _advice)


def sample(level: int, rng: random.Random, patterns: str = "all") -> Query:
    """Draw one request, definite (level 1) or open (level 2)."""
    wordings, answer = _definite(rng) if level == 1 else rng.choice(_OPEN)(rng)
    prompt, is_other = choose_pattern(wordings, patterns, rng)
    return Query(prompt, "", answer, level, domain_name("everyday", is_other))
