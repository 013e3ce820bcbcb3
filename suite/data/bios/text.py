"""The text of the synthetic biographies: invented names and values, and the sentences that contain them.

Every sentence and every question ends with a value and the stop, so that a prompt is everything before the value.
Held-out sentences use only words that also occur in the training sentences of some attribute. Any change in this file
changes every world and must increment `TEMPLATE_SET`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

TEMPLATE_SET = 1
STOP = "."
ROUNDS = 4  # each uses another training template for a fact

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = tuple(c + v for c in _CONSONANTS for v in _VOWELS)
TWO_SYLLABLES = len(_SYLLABLES) ** 2
_STRIDE = 1009  # coprime to TWO_SYLLABLES: neighbours in the list differ visibly


def invented(index: int, ending: str) -> str:
    """Return the index-th invented word of two syllables and an ending; distinct below TWO_SYLLABLES (4,900)."""
    first, second = divmod(index * _STRIDE % TWO_SYLLABLES, len(_SYLLABLES))
    return (_SYLLABLES[first] + _SYLLABLES[second] + ending).capitalize()


def invented_words(count: int, ending: str) -> tuple[str, ...]:
    """Return the first `count` invented words with that ending."""
    assert count <= TWO_SYLLABLES, "two syllables give fewer words"
    return tuple(invented(index, ending) for index in range(count))


@dataclass(frozen=True)
class Attribute:
    """An attribute of a person: its K equally likely values, and the texts that state it or pose it as a question.

    `training` and `held_out` are sentences up to the value; `questions` are the questions alone.
    """

    name: str
    values: tuple[str, ...]
    training: tuple[str, ...]
    held_out: tuple[str, ...]
    questions: tuple[str, ...]

    @cached_property
    def answers(self) -> tuple[str, ...]:
        """Every value as it is scored, with the space before it and its stop. No answer is a prefix of another."""
        return tuple(f" {value}{STOP}" for value in self.values)

    @cached_property
    def question_prompts(self) -> tuple[str, ...]:
        """Prompts in the style of TriviaQA and NQ, up to the answer."""
        return tuple(f"Question: {question}?\nAnswer:" for question in self.questions)


def _pairs(heads: tuple[str, ...], tails: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{head} {tail}" for head in heads for tail in tails)


_COMPANY_KINDS = ("Motors", "Foods", "Mills", "Airlines", "Textiles")
_UNIVERSITY_KINDS = ("University", "College", "Institute", "Academy", "Polytechnic")
_FIELD_KINDS = (
    "Applied",
    "Comparative",
    "Computational",
    "Environmental",
    "Experimental",
    "Historical",
    "Industrial",
    "Marine",
    "Medical",
    "Theoretical",
)
_FIELDS = (
    "Acoustics",
    "Biology",
    "Chemistry",
    "Economics",
    "Geography",
    "Linguistics",
    "Mathematics",
    "Optics",
    "Physics",
    "Psychology",
)
_INSTRUMENTS = (
    "accordion",
    "bagpipe",
    "balalaika",
    "banjo",
    "bassoon",
    "bugle",
    "cello",
    "clarinet",
    "cornet",
    "dulcimer",
    "flute",
    "guitar",
    "harmonica",
    "harp",
    "harpsichord",
    "horn",
    "lute",
    "lyre",
    "mandolin",
    "oboe",
    "organ",
    "piano",
    "piccolo",
    "sitar",
    "trombone",
    "trumpet",
    "tuba",
    "violin",
)

ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "birth city",
        invented_words(200, "ville"),
        (
            "{name} was born in the city of",
            "{name} is a native of",
            "The birthplace of {name} is",
            "{name} came to life in",
        ),
        ("The native city of {name} is", "{name} came from the city of"),
        ("Which city was {name} born in", "What is the birthplace of {name}"),
    ),
    Attribute(
        "employer",
        _pairs(invented_words(20, "co"), _COMPANY_KINDS),
        (
            "{name} works for the company",
            "{name} is employed by",
            "The employer of {name} is",
            "{name} has a job at",
        ),
        ("The company of {name} is", "{name} works at"),
        ("Which company does {name} work for", "Who is the employer of {name}"),
    ),
    Attribute(
        "birth year",
        tuple(str(year) for year in range(1950, 2000)),
        (
            "{name} was born in the year",
            "The birth year of {name} is",
            "The life of {name} began in",
            "{name} has been alive since",
        ),
        ("The year {name} was born is", "{name} began life in"),
        ("In which year was {name} born", "What is the birth year of {name}"),
    ),
    Attribute(
        "university",
        _pairs(invented_words(60, "ford"), _UNIVERSITY_KINDS),
        (
            "{name} is a graduate of",
            "{name} got a degree from",
            "{name} was a student at",
            "The alma mater of {name} is",
        ),
        ("{name} was a graduate from", "The degree of {name} came from"),
        ("Which university did {name} attend", "What is the alma mater of {name}"),
    ),
    Attribute(
        "major",
        _pairs(_FIELD_KINDS, _FIELDS),
        (
            "{name} studied the subject of",
            "{name} has a degree in",
            "The major of {name} was",
            "{name} took courses in",
        ),
        ("The subject {name} studied was", "The degree of {name} is in"),
        ("What subject did {name} study", "What was the major of {name}"),
    ),
    Attribute(
        "instrument",
        _INSTRUMENTS,
        (
            "{name} likes to play the",
            "The instrument of {name} is the",
            "{name} takes lessons on the",
            "{name} has learned the",
        ),
        ("{name} likes lessons on the", "The instrument {name} has learned is the"),
        ("Which instrument does {name} play", "What is the instrument of {name}"),
    ),
)

FIRST_NAME_ENDING = "n"
LAST_NAME_ENDING = "sen"
