"""What a Flamingo learns from a few captioned scenes: an object that they name as no training caption did.

An episode has one object with a new name, K scenes with it whose captions use that name, and another scene
with it to caption. Right is a caption with the new name, and nothing else, in the object's slot. With
shuffled shots the captions stay and the images are those of another episode, so that what a caption names is
not in its image; without shots the name cannot be known.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.data import Scenes, load_scenes, parse_caption
from vlmkernels.data.scenes import OBJECTS
from vlmkernels.use.bundle import Bundle

SHOTS = (0, 1, 2, 4)
EPISODES = 200
KNOWN = 24  # objects of the training scenes
NAMES = ("blicket", "dax", "wug", "toma", "zorp", "fep", "gazzer", "kiki")  # in no caption of the scenes
TASKS = {"known": "a known object, a new name", "unseen": "an unseen object, its own name"}
BATCH = 50
NEW_TOKENS = 28  # of a caption


@dataclasses.dataclass(frozen=True)
class Episode:
    """Scenes by their index: those of the shots, and the one to caption; the object, and its name here."""

    shots: tuple[int, ...]
    query: int
    concept: str
    name: str


def episodes(scenes: Scenes, task: str, count: int, seed: int = 0) -> list[Episode]:
    """``count`` episodes of the most shots. Objects of one episode other than its own are known ones."""
    rng = random.Random(seed)
    known = set(OBJECTS[:KNOWN])
    having: dict[str, list[int]] = {}
    for index in range(len(scenes)):
        objects = scenes.scene(index).objects
        unseen = [name for name in objects if name not in known]
        for concept in objects if task == "known" else unseen:
            if len(unseen) == (task == "unseen"):
                having.setdefault(concept, []).append(index)
    concepts = sorted(name for name, found in having.items() if len(found) > max(SHOTS))
    made = []
    for _ in range(count):
        concept = rng.choice(concepts)
        query, *shots = rng.sample(having[concept], max(SHOTS) + 1)
        made.append(Episode(tuple(shots), query, concept, rng.choice(NAMES) if task == "known" else concept))
    return made


def others(made: Sequence[Episode]) -> list[Episode]:
    """For each episode the next one, in the order given, of another object."""
    found = []
    for at, one in enumerate(made):
        later = [*made[at + 1 :], *made[:at]]
        found.append(next(other for other in later if other.concept != one.concept))
    return found


def renamed(caption: str, episode: Episode) -> str:
    """The caption with the episode's name of its object."""
    words = caption.split()
    for at, word in enumerate(words):
        if word == episode.concept:
            words[at] = episode.name
            words[at - 1] = "an" if episode.name[0] in "aeiou" else "a"
    return " ".join(words)


def right(caption: str, scenes: Scenes, episode: Episode) -> bool:
    """Whether the slot of the episode's object has its name."""
    slot = scenes.scene(episode.query).objects.index(episode.concept)
    objects = parse_caption(caption)[0]
    return len(objects) > slot and objects[slot] == episode.name


def prompt(tokenizer: Any, scenes: Scenes, episode: Episode, shots: int) -> list[int]:
    """Ids of so many captioned scenes and of the image to caption."""
    ids: list[int] = []
    for index in episode.shots[:shots]:
        words = tokenizer.encode(renamed(scenes.scene(index).caption, episode))
        ids += [tokenizer.image_id, *words, tokenizer.endofchunk_id]
    return [*ids, tokenizer.image_id]


def fitting(bundle: Bundle, scenes: Scenes, made: Sequence[Episode]) -> list[int]:
    """The numbers of shots for which every prompt and a caption fit into the context."""
    room = bundle.tokenizer.context_length - NEW_TOKENS
    longest = {
        shots: max(len(prompt(bundle.tokenizer, scenes, one, shots)) for one in made) for shots in SHOTS
    }
    return [shots for shots, length in longest.items() if length <= room]


@torch.no_grad()
def write(bundle: Bundle, scenes: Scenes, made: Sequence[Episode], shots: int, shuffled: bool) -> list[str]:
    """A caption of each episode's query after so many of its shots."""
    model: Any = bundle.model.eval()
    tokenizer: Any = bundle.tokenizer
    assert bundle.transform is not None, "a Flamingo has one"
    texts: list[str] = []
    sources = others(made) if shuffled else made
    for first in range(0, len(made), BATCH):
        images = []
        for one, source in zip(made[first : first + BATCH], sources[first : first + BATCH], strict=True):
            shown = [*source.shots[:shots], one.query]
            images.append(torch.stack([bundle.transform(scenes[index]["image"]) for index in shown]))
        rows = [prompt(tokenizer, scenes, one, shots) for one in made[first : first + BATCH]]
        tokens, mask = left_padded(rows, tokenizer.pad_id)
        seen = torch.stack(images)[:, :, None]
        written = model.generate(seen, tokens, attention_mask=mask, max_new_tokens=NEW_TOKENS)
        texts += [tokenizer.decode(row) for row in written.tolist()]
    return texts


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and mask [B, T] of rows of ids, padded on the left."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[pad] * (longest - len(row)) + [*row] for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


def measure(bundle: Bundle, episodes_of_each: int = EPISODES) -> dict[str, Any]:
    """For each task and number of shots the fraction of right names, with true and with shuffled shots.

    Numbers of shots that the context has no room for are left out.
    """
    scenes = load_scenes("test", size=4000, objects=len(OBJECTS), seed=1)
    found: dict[str, Any] = {"episodes": episodes_of_each}
    for task in TASKS:
        made = episodes(scenes, task, episodes_of_each)
        for name, shuffled in (("true", False), ("shuffled", True)):
            found.setdefault(task, {})[name] = {
                str(shots): statistics.fmean(
                    right(caption, scenes, one)
                    for caption, one in zip(write(bundle, scenes, made, shots, shuffled), made, strict=True)
                )
                for shots in fitting(bundle, scenes, made)
                if shots or not shuffled
            }
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each task and kind of shots, means over the Flamingos."""
    lines = [
        "| name of | shots | " + " | ".join(map(str, SHOTS)) + " |",
        "|---|---|" + "---|" * len(SHOTS),
    ]
    for task, title in TASKS.items():
        for kind in ("true", "shuffled"):
            cells = []
            for shots in SHOTS:
                values = [result["shots"][task][kind].get(str(shots)) for result in results]
                cells.append("" if None in values else f"{100 * statistics.fmean(values):.1f} %")
            lines.append(f"| {title} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)
