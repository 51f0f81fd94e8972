"""Prompts of many kinds for a model to answer, made from seeds: what it samples from them is text in its own words."""

from collections.abc import Callable, Sequence

import numpy as np

from octavo.errors import ConfigError

_TOPICS = (
    "the moon|volcanoes|bread|the Roman empire|photosynthesis|bicycles|jazz|a thunderstorm|honey bees|chess|"
    "the printing press|black holes|coffee|glaciers|owls|the French Revolution|electric cars|sleep|vaccines|the ocean|"
    "bridges|a lighthouse keeper|tea|maps|dinosaurs|the human heart|gardens|robots|steam engines|language|the desert|"
    "libraries|money|a small village|earthquakes|rivers|the stock market|painting|the internet|salt|windmills|wolves|"
    "mathematics|a long journey|friendship|trains|spices|the brain|rain forests|time travel|an old clock|soil|castles|"
    "satellites|football|dreams|cheese|the alphabet|whales|a lost letter|batteries|snow|democracy|recycling|the violin"
).split("|")
_PEOPLE = "a child|a farmer|a new colleague|a student|a tourist|an engineer|my grandmother|a doctor|a beginner".split(
    "|"
)
_PLACES = "in the mountains|on a ship|in a crowded city|at night|in winter|on another planet|in a kitchen".split("|")
_TASKS = (
    "reverses a string|counts the words of a text|sorts a list of numbers|finds the largest of three numbers|"
    "reads a file line by line|checks whether a number is prime|merges two dictionaries|removes duplicates from a list|"
    "computes the mean and the median|converts Celsius to Fahrenheit|parses a date|checks for palindromes|"
    "downloads a page|validates an e-mail address|computes Fibonacci numbers|flattens lists|plays a guessing game"
).split("|")
_LANGUAGES = "Python|JavaScript|C|Java|Rust|Go|SQL|Bash".split("|")
_FORMS: tuple[Callable[["Draw"], str], ...] = (
    lambda d: f"What is {d.topic()}?" if d.chance() else f"Tell me about {d.topic()}.",
    lambda d: f"Explain {d.topic()} to {d.person()}.",
    lambda d: f"Write a short story about {d.topic()} {d.place()}.",
    lambda d: f"Write a poem about {d.topic()}.",
    lambda d: f"Give me {d.number(3, 12)} facts about {d.topic()}.",
    lambda d: f"What are the advantages and disadvantages of {d.topic()}?",
    lambda d: f"Compare {d.topic()} and {d.topic()}.",
    lambda d: f"Write a letter to {d.person()} about {d.topic()}.",
    lambda d: f"How would {d.person()} describe {d.topic()}?",
    lambda d: f"Write a dialogue between {d.person()} and {d.person()} about {d.topic()}.",
    lambda d: f"Make a table with {d.number(3, 8)} rows about {d.topic()}.",
    lambda d: f"List {d.number(5, 20)} words that have to do with {d.topic()}.",
    lambda d: f"Write a function in {d.language()} that {d.task()}.",
    lambda d: f"Show me how to write a program that {d.task()} and explain it line by line.",
    lambda d: f"Give an example of JSON that describes {d.topic()}.",
    lambda d: f"Write {d.number(2, 5)} questions with answers about {d.topic()} for a quiz.",
    lambda d: f"Summarise the history of {d.topic()} in {d.number(2, 6)} sentences.",
    lambda d: f"Give step-by-step instructions for {d.person()} who wants to learn about {d.topic()}.",
    lambda d: f"I have {d.number(12, 99)} apples and give away {d.number(2, 11)}. How many are left? Explain.",
    lambda d: f"A train goes {d.number(40, 160)} km in an hour. How far does it go in {d.number(2, 9)} hours?",
    lambda d: f"What is {d.number(11, 99)} times {d.number(3, 19)}? Show the steps.",
    lambda d: f"Write an advertisement for {d.topic()}.",
    lambda d: f"Write the beginning of a novel that plays {d.place()}.",
    lambda d: f"Write an article about {d.topic()} with headings.",
    lambda d: f"Translate into French and German: I would like to know more about {d.topic()}.",
    lambda d: f"What could {d.person()} do {d.place()}? Give {d.number(3, 8)} ideas.",
    lambda d: f"Describe a day {d.place()}.",
    lambda d: f"Why do people like {d.topic()}? Argue for and against it.",
)


class Draw:
    """Words for prompts, drawn from a generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def one(self, options: Sequence[str]) -> str:
        """One of `options`."""
        return options[int(self.rng.integers(len(options)))]

    def chance(self) -> bool:
        return bool(self.rng.random() < 0.5)

    def number(self, least: int, most: int) -> int:
        return int(self.rng.integers(least, most + 1))

    def topic(self) -> str:
        return self.one(_TOPICS)

    def person(self) -> str:
        return self.one(_PEOPLE)

    def place(self) -> str:
        return self.one(_PLACES)

    def task(self) -> str:
        return self.one(_TASKS)

    def language(self) -> str:
        return self.one(_LANGUAGES)


def made_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` prompts: questions, stories, lists, tables, code, sums and more. Raises ConfigError."""
    if count < 1:
        raise ConfigError(f"the number of prompts must be at least 1, not {count}")
    draw = Draw(np.random.default_rng(seed))
    return [_FORMS[int(draw.rng.integers(len(_FORMS)))](draw) for _ in range(count)]
