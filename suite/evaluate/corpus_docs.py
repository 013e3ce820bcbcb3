"""Documents from the corpus itself: probes, questions and choices of a bios world, or held-out text."""

from __future__ import annotations

from suite.data import seeded_random
from suite.data.bios.text import STOP
from suite.data.bios.world import Probe, World
from suite.data.corpus import Corpus
from suite.data.sources.bios import BiosData
from suite.data.sources.registry import DataConfig
from suite.errors import UserError
from suite.evaluate.datasets import Docs

CHOICES = 4
_CHOICE_SEED = 1
MAX_CHARACTERS = 1 << 15
"""Of a held-out document: a few books would otherwise take longer to score than a small model takes to train."""


def refuse_unfit(data: DataConfig, task: str, name: str) -> None:
    """Raise UserError if the task cannot be asked of what was (or will be) trained on; `name` as of `documents`."""
    if (data.kind == "bios") is (name == "held_out"):
        allowed = "a kind of text" if name == "held_out" else "'bios'"
        raise UserError(f"task {task}: data.kind: got {data.kind!r}, allowed: {allowed}")
    if isinstance(data, BiosData) and name in ("extraction", "qa", "choice"):
        asked = round(data.questions * data.people)
        if not 0 < asked < data.people:
            raise UserError(
                f"task {task}: data.questions: got {data.questions}, allowed: a share that leaves some people asked"
                " about in training and some not"
            )


def documents(corpus: Corpus, task: str, name: str) -> Docs:
    """The documents of a task over the corpus: `storage`, `paraphrase`, `extraction`, `qa`, `choice` or `held_out`.

    Raises:
        UserError: the task does not fit the corpus.
    """
    refuse_unfit(corpus.config, task, name)
    world = corpus.world
    if world is None:
        return Docs({"text": _beginning(text)} for text in corpus.held_out)
    if name in ("storage", "paraphrase"):
        return Docs(_probe(probe) for probe in world.probes(name))  # type: ignore[arg-type]
    probes = world.probes("extraction")
    if name == "extraction":
        return Docs(_probe(probe) for probe in probes)
    # one wording of each question is enough to generate from and to choose by
    first = [probe for probe in probes if probe.template == 0]
    return Docs(_question(probe) if name == "qa" else _choice(world, probe) for probe in first)


def _beginning(text: str) -> str:
    """At most MAX_CHARACTERS of a text, whole words."""
    if len(text) <= MAX_CHARACTERS:
        return text
    cut = text[:MAX_CHARACTERS]
    return cut.rsplit(maxsplit=1)[0] or cut


def _probe(probe: Probe) -> dict[str, object]:
    return {"prompt": probe.prompt, "answer": probe.answer, "probe": probe, "person": probe.person}


def _question(probe: Probe) -> dict[str, object]:
    return {"prompt": probe.prompt, "answer": probe.answer.strip().removesuffix(STOP), "person": probe.person}


def _choice(world: World, probe: Probe) -> dict[str, object]:
    """The right answer among three others of the attribute, at a place fixed by person and attribute."""
    order = seeded_random.permutation(len(probe.candidates), _CHOICE_SEED, world.seed, probe.person, probe.attribute)
    others = [probe.candidates[i] for i in order if probe.candidates[i] != probe.answer][: CHOICES - 1]
    gold = int(order[0]) % CHOICES
    choices = [*others[:gold], probe.answer, *others[gold:]]
    return {"prompt": probe.prompt, "choices": choices, "gold": gold, "person": probe.person}
