"""Documents from the corpus itself: probes, questions and choices of a bios world, or held-out text."""

from __future__ import annotations

from suite.data import seeded_random
from suite.data.bios.text import STOP
from suite.data.bios.world import Probe, World
from suite.data.corpus import Corpus
from suite.data.sources.registry import DataConfig
from suite.errors import UserError
from suite.evaluate.datasets import Docs

CHOICES = 4
_CHOICE_SEED = 1
MAX_CHARACTERS = 1 << 15
"""Maximum length of a held-out document. A few books would take longer to score than a small model to train."""


def refuse_unfit(data: DataConfig, task: str, name: str) -> None:
    """Check that a task suits the training data of a model.

    Args:
        data: The `data` block of the cell.
        task: The task's name, for errors.
        name: The kind of its documents (see `documents`).

    Raises:
        UserError: The task does not suit the data.
    """
    problem = data.task_problem(name)
    if problem is not None:
        field, value, allowed = problem
        raise UserError(f"task {task}: data.{field}: got {value!r}, allowed: {allowed}")


def documents(corpus: Corpus, task: str, name: str) -> Docs:
    """Return the documents of a task about the corpus.

    Args:
        corpus: The training data of a model.
        task: The task's name, for errors.
        name: `storage`, `paraphrase`, `extraction`, `qa`, `choice` or `held_out`.

    Raises:
        UserError: The task does not suit the corpus.
    """
    refuse_unfit(corpus.config, task, name)
    if corpus.world is None:
        return Docs({"text": _beginning(text)} for text in corpus.held_out)
    return of_world(corpus.world, name)


def of_world(world: World, name: str) -> Docs:
    """Return the documents of a task about a world; `name` as for `documents`, without `held_out`."""
    if name in ("storage", "paraphrase"):
        return Docs(_probe(probe) for probe in world.probes(name))  # type: ignore[arg-type]
    probes = world.probes("extraction")
    if name == "extraction":
        return Docs(_probe(probe) for probe in probes)
    # One wording of each question is enough for generation and multiple choice.
    first = [probe for probe in probes if probe.template == 0]
    return Docs(_question(probe) if name == "qa" else _choice(world, probe) for probe in first)


def _beginning(text: str) -> str:
    """Return the beginning of a text: at most MAX_CHARACTERS, in whole words."""
    if len(text) <= MAX_CHARACTERS:
        return text
    start = text[:MAX_CHARACTERS]
    return start.rsplit(maxsplit=1)[0] or start


def _probe(probe: Probe) -> dict[str, object]:
    return {"prompt": probe.prompt, "answer": probe.answer, "probe": probe, "person": probe.person}


def _question(probe: Probe) -> dict[str, object]:
    return {"prompt": probe.prompt, "answer": probe.answer.strip().removesuffix(STOP), "person": probe.person}


def _choice(world: World, probe: Probe) -> dict[str, object]:
    """Return the right answer among three others of the attribute, at a position fixed by person and attribute."""
    order = seeded_random.permutation(len(probe.candidates), _CHOICE_SEED, world.seed, probe.person, probe.attribute)
    others = [probe.candidates[i] for i in order if probe.candidates[i] != probe.answer][: CHOICES - 1]
    gold = int(order[0]) % CHOICES
    choices = [*others[:gold], probe.answer, *others[gold:]]
    return {"prompt": probe.prompt, "choices": choices, "gold": gold, "person": probe.person}
